"""A Trainer of one's own, without the command line: nothing of it is logged, kept or shown."""

import pytorch_lightning as pl


def plain_trainer(*callbacks, epochs=1, **settings):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        inference_mode=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
