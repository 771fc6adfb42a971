"""Segmentation scores from a confusion matrix."""

from typing import NamedTuple

import numpy as np

from supmim_jax.config import IGNORED
from supmim_jax.evals.results import CannotEvaluate


class Scores(NamedTuple):
    """In per cent. IoU is NaN for a class that neither the truth nor a prediction has."""

    miou: float  # mean over the other classes
    pixel_accuracy: float
    iou_V: np.ndarray  # float64


def count(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by (true class, predicted class), int64 VxV, without those that are IGNORED.

    Arrays of one shape, whatever it is; matrices of several batches add up.
    """
    if truth.shape != predicted.shape:
        raise CannotEvaluate(f"Masks are {truth.shape}, predictions {predicted.shape}.")
    valid = truth != IGNORED
    cell = truth[valid].astype(np.int64) * classes + predicted[valid]
    return np.bincount(cell, minlength=classes**2).reshape(classes, classes)


def score(matrix_VxV: np.ndarray) -> Scores:
    """Scores of all pixels counted."""
    if not matrix_VxV.sum():
        raise CannotEvaluate("No pixel of the masks counts: all are to be ignored.")
    right_V = np.diag(matrix_VxV)
    union_V = matrix_VxV.sum(axis=0) + matrix_VxV.sum(axis=1) - right_V
    iou_V = np.full(len(union_V), np.nan)
    iou_V[union_V > 0] = 100.0 * right_V[union_V > 0] / union_V[union_V > 0]
    accuracy = 100.0 * right_V.sum() / matrix_VxV.sum()
    return Scores(float(np.nanmean(iou_V)), float(accuracy), iou_V)
