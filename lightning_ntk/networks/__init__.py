"""Networks `f(theta, x)`: inputs `[n, *input_shape]` to outputs `[n, C]`. Each states its normalisation."""
