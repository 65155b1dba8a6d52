"""Measuring a checkpoint against its data, for `latentflow evaluate`.

:mod:`data` loads what was trained on and what was not, :mod:`sampler` generates images, :mod:`figures` computes each
figure of the report from :mod:`latentflow.metrics`, :mod:`report` writes it. docs/reference/evaluation.md
says what each means.
"""
