"""The support NTK by neural-tangents: a script for the Python of `make peers`, which has jax and not this package.

    python -I neural_tangents_peer.py FOLDER DEVICE THREADS

FOLDER/input.npz holds the images `[T, n, H, W, channels]` as `x`, the weights of the convolutions as `w0, b0, w1, ...`
(`[kh, kw, in, out]`) and of the linear head as `w`, `b`. Then it answers each line of its standard input by a line of
JSON: `compile NAME` compiles one of the implementations, runs it once and writes its kernels `[T, n, n, C, C]` to
FOLDER/NAME.npy; `run NAME` runs it again. Both answer with `seconds`, and `compile` with `flop`, the operations that
XLA counts in what it compiled (all of them, where torch's counter takes products and convolutions; null where it
cannot).
"""

import json
import os
import sys
import time


def main() -> None:
    """Serve until the standard input ends."""
    folder, device, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA takes as many threads as it may use cores.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    def answer(**content) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    import jax
    import neural_tangents

    jax.config.update("jax_default_matmul_precision", "highest")
    if device == "cuda" and jax.default_backend() != "gpu":
        answer(error="this jax sees no GPU")
        return
    versions = {"jax": jax.__version__, "neural_tangents": neural_tangents.__version__}
    answer(versions=versions, python=sys.version.split()[0])
    serve(folder, answer)


def serve(folder: str, answer) -> None:
    """Answer the commands; see the module's docstring."""
    import jax
    import neural_tangents
    import numpy

    data = dict(numpy.load(os.path.join(folder, "input.npz")))
    x = jax.numpy.asarray(data.pop("x"))
    params = {name: jax.numpy.asarray(value) for name, value in data.items()}
    compiled = {}
    for line in sys.stdin:
        command, name = line.split()
        start = time.perf_counter()
        try:
            if command == "compile":
                kernel = neural_tangents.empirical_ntk_fn(
                    conv4, trace_axes=(), vmap_axes=0, implementation=neural_tangents.NtkImplementation[name]
                )
                compiled[name] = batched(kernel).lower(x, params).compile()
            result = compiled[name](x, params).block_until_ready()
        except Exception as error:  # Out of memory, mostly: the other end decides.
            answer(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        seconds = time.perf_counter() - start
        if command == "compile":
            numpy.save(os.path.join(folder, f"{name}.npy"), numpy.asarray(result))
            answer(seconds=seconds, flop=operations(compiled[name]))
        else:
            answer(seconds=seconds)


def operations(program):
    """XLA's count of floating-point operations in a compiled program; None where it gives none."""
    analysis = program.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) and analysis else analysis
    flop = analysis.get("flops") if isinstance(analysis, dict) else None
    return flop if flop and flop > 0 else None


def batched(kernel):
    """The jitted kernels of T tasks; one task goes without the vmap."""
    import jax

    def all_tasks(x, params):
        def of_one(task):
            return kernel(task, None, params)

        return of_one(x[0])[None] if len(x) == 1 else jax.vmap(of_one)(x)

    return jax.jit(all_tasks)


def conv4(params, x):
    """Conv4 without normalisation, with 2x2 max pooling, on `[n, H, W, channels]`: outputs `[n, C]`."""
    import jax

    block = 0
    while f"w{block}" in params:
        x = jax.lax.conv_general_dilated(
            x, params[f"w{block}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"b{block}"])
        x = jax.lax.reduce_window(x, -jax.numpy.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        block += 1
    # The head's weights are in the order channels, height, width.
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return x @ params["w"] + params["b"]


if __name__ == "__main__":
    main()
