"""Attacks on images in [0, 1]: pure functions of a predictor, usable without the rest.

`white_box` (FGSM, PGD), `simba` (black box), `noise` (the control), `losses` (what they raise), `art_adapter` (any
attack of the Adversarial Robustness Toolbox). docs/ROBUSTNESS.md states the threat models.
"""
