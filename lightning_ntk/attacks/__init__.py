"""Attacks on images in [0, 1]: pure functions of a predictor, usable without the rest.

`white_box` (FGSM, PGD), `simba` (black box), `noise` (the control), `support` (through the adaptation), `losses`
(what they raise), `suite` (all by name), `masking` (signs of useless gradients), `art_adapter` (any attack of the
Adversarial Robustness Toolbox). docs/ROBUSTNESS.md states the threat models.
"""
