"""Parts of the page that are images."""

from collections.abc import Sequence

import numpy as np

from supmim_jax.config import IGNORED
from supmim_jax.report import pictures
from supmim_jax.report.markup import Markup, Section, element, join, note, section, table
from supmim_jax.report.measured import GROUND, Examples, Neighbourhood, Panels, Segmented


def neighbours(examples: Examples, found: Neighbourhood, classes: Sequence[str]) -> Section:
    """A row per query; the frame and a mark tell whether a neighbour has the query's class."""
    rows = []
    for image, label, images, labels, similarity in zip(*examples, *found, strict=True):
        query = join(
            element("div", pictures.image(image, f"query, {classes[label]}"), class_="frame query"),
            classes[label],
        )
        near = zip(images, labels, similarity, strict=True)
        rows.append((query, *(neighbour(*one, label, classes) for one in near)))
    count, same = found.labels.size, int((found.labels == examples.labels[:, None]).sum())
    text = (
        f"The first {len(rows)} images of the split and the training images whose features are "
        f"most similar (cosine, below each). A whole frame and ✓: the query's class; a broken "
        f"frame and ✗: another. {same} of {count} neighbours have the query's class."
    )
    head = ("query", *(str(i + 1) for i in range(found.labels.shape[1])))
    grid = table("Nearest training images, the nearest first.", head, rows, class_="neighbours")
    return section("Nearest neighbours", "neighbours", note(text), grid)


def neighbour(
    image: np.ndarray, label: int, similarity: float, wanted: int, classes: Sequence[str]
) -> Markup:
    same = label == wanted
    kind, sign, mark = ("same", "✓", "tick") if same else ("other", "✗", "cross")
    told = "same class" if same else "another class"
    picture = pictures.image(image, f"neighbour, {classes[label]}, {told}")
    return join(
        element("div", picture, class_=f"frame {kind}"),
        element("span", sign, class_=mark),
        f" {classes[label]}",
        element("span", f"{similarity:.2f}", class_="soft"),
    )


def predictions(examples: Examples, panels: Panels, classes: Sequence[str]) -> Section:
    """Images, masked twins and predictions, or a tokenizer's images and reconstructions."""
    titles = [classes[label] for label in examples.labels]
    if "masked" not in panels:
        pairs = {"image": panels["image"], "reconstruction": panels["tokens"]}
        text = "The first images of the split, and what comes back from their tokens."
        return section("Reconstructions", "predictions", note(text), pictures.cards(titles, pairs))
    text = (
        "The first images of the split; their tokens decoded, which is the best that a prediction "
        "could look like; what the encoder sees of them; and the decoder's likeliest tokens in "
        "the masked places."
    )
    if "tokens" not in panels:
        text = (
            "The first images of the split; what the encoder sees of them; and the same with the "
            "decoder's predictions in the masked places. Where the target is normalised patches, "
            "the predictions have the mean and the contrast of the true ones."
        )
    cards = pictures.cards(titles, panels)
    return section("Masked-image prediction", "predictions", note(text), cards)


def components(examples: Examples, tokens_BxHxWxD: np.ndarray, classes: Sequence[str]) -> Section:
    """The first three principal components of the patch tokens as red, green and blue."""
    height, width = examples.images.shape[1:3]
    colours = pictures.enlarged(pictures.components(tokens_BxHxWxD), height, width)
    cards = pictures.cards(
        [classes[label] for label in examples.labels],
        {"image": examples.images, "components": colours},
    )
    text = (
        "The first three principal components of the patch tokens of all images below, as red, "
        "green and blue: patches of like colour have like features, also across images."
    )
    return section("Patch tokens", "tokens", note(text), cards)


def segmentation(found: Segmented) -> Section:
    """Masks and predictions over their images."""
    titles, ground = [], found.classes.index(GROUND) if GROUND in found.classes else None
    for mask, prediction in zip(found.masks, found.predictions, strict=True):
        counted = mask != IGNORED
        agree = 100 * (mask == prediction)[counted].mean() if counted.any() else 0.0
        there = np.union1d(mask[counted], prediction[counted])
        names = ", ".join(found.classes[c] for c in there if c != ground)
        titles.append(f"{agree:.0f} % of pixels agree; {names or f'{GROUND} only'}")
    rows = {
        "image": found.images,
        "mask": pictures.overlaid(found.images, found.masks, ground),
        "prediction": pictures.overlaid(found.images, found.predictions, ground),
    }
    text = f"The masks of the data set and what {found.head} predicts, a colour per class."
    return section("Segmentation", "segmentation", note(text), pictures.cards(titles, rows))
