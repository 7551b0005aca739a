"""Figures of what each model does: how it learns, how sure it is, where it errs, whom it asks. No torch here."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mnist_lab.measure import NUM_BINS
from mnist_lab.report.drawing import (
    COLORS,
    MARKERS,
    MUTED,
    Axes,
    Figure,
    MaxNLocator,
    Values,
    draw_heatmap,
    draw_legend,
    extra_height,
    label_outer,
    make_figure,
    make_logarithmic,
    spread,
    wrap,
    write_footnote,
)
from mnist_lab.report.records import CONTROL, Epoch, Record
from mnist_lab.report.results import Model, Results, num_seeds, where
from mnist_lab.report.statistics import binomial_interval

MAX_MOE_VARIANTS = 4
MAX_PANELS = 60  # of a model each
FEW_IMAGES = 10  # of which an accuracy says next to nothing
MANY_CLASSES = 30  # of which not every name and number has room
MAX_CLASS_NAME = 10  # characters


def training_curves(results: Results) -> Figure | None:
    """Validation error and each term of the training loss, per epoch: the mean, and every seed thin."""
    models = [model for model in results.models if model.runs[0].curves]
    if not models:
        return None
    terms = dict.fromkeys(term for model in models for epoch in model.runs[0].curves for term in epoch["train_terms"])
    series: list[tuple[str, Callable[[Epoch], float]]] = [
        ("validation error (%)", lambda epoch: 100 * (1 - epoch["validation_acc"])),
        *(
            (
                f"training loss: {term.replace('_', ' ')} (nats)",
                lambda epoch, term=term: epoch["train_terms"].get(term, np.nan),
            )
            for term in terms
        ),
    ]
    size = (11.5, 4 * math.ceil(len(series) / 2) + 0.8)
    figure, panels = make_figure(results.records, "Training curves", cells=len(series), columns=2, size=size)
    for axes, (label, value_of) in zip(panels, series, strict=True):
        for model in models:
            _draw_curve(axes, model, value_of)
        make_logarithmic(axes, "y", label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    draw_legend(figure, {model.short_name: model.look for model in models}, linestyle="-")
    seeds = max(len(model.runs) for model in models)
    note = "mean and single seeds; " if seeds > 1 else ""
    finetuned = "; of a compressed model: its fine-tuning" if any(model.is_derived for model in models) else ""
    write_footnote(figure, f"{note}each term of the loss before its weight, mean over the epoch as it ran{finetuned}")
    return figure


def confidence_histogram(results: Results) -> Figure | None:
    """How sure the teacher, its student and the student without a teacher are of their test predictions."""
    models = {model.name: model for model in results.models if _has_bins(model)}
    taught = [model for model in models.values() if _teacher_of(model) in models and not model.is_rival]
    if not taught:
        return None
    student = min(taught, key=lambda model: model.family != "KD_FFN_Student")
    control = next((model for model in models.values() if model.family == CONTROL), None)
    shown = [
        (models[_teacher_of(student)], "teacher"),
        (student, "distilled student"),
        *([(control, "student, no teacher")] if control else []),
    ]
    titles = [wrap(f"{role}: {model.label}", 3.7, 10) for model, role in shown]
    size = (4.2 * len(shown), 4.4 + extra_height(titles))
    figure, panels = make_figure(
        results.records, "Confidence of test predictions", columns=len(shown), size=size, sharey=True
    )
    for axes, (model, _), title in zip(panels, shown, titles, strict=True):
        _draw_confidences(axes, model, title)
    panels[0].set_ylabel("share of test images (%)")
    models_shown = [model for model, _ in shown]
    seeds = max(len(model.runs) for model in models_shown)
    spread_note = f"mean of {num_seeds(models_shown)}, error bars: lowest and highest seed" if seeds > 1 else "one seed"
    write_footnote(figure, f"{where(models_shown)}; {NUM_BINS} bins, {spread_note}")
    return figure


def reliability_diagram(results: Results) -> Figure | None:
    """Accuracy over confidence in 15 bins, seeds pooled, a panel per model; the calibrated one is on the diagonal."""
    found = [model for model in results.models if _has_bins(model)]
    models = found[:MAX_PANELS]
    if not models:
        return None
    columns = min(5, len(models))
    labels = [wrap(model.label, 2.4, 9) for model in models]
    size = (max(6, 2.7 * columns), (2.8 + extra_height(labels)) * math.ceil(len(models) / columns) + 1)
    figure, panels = make_figure(
        results.records, "Reliability", cells=len(models), columns=columns, size=size, sharex=True, sharey=True
    )
    for axes, model, label in zip(panels, models, labels, strict=True):
        _draw_reliability(axes, model)
        axes.set_title(f"{label}\nECE {100 * model.row['ece']:.2f} %", fontsize=9)
        axes.set_aspect("equal")
    ticks = range(0, 101, 25)
    panels[0].set(xlim=(-3, 106), ylim=(-6, 106), xticks=ticks, yticks=ticks)  # shared by all
    label_outer(panels, columns, "mean confidence (%)", "accuracy (%)")
    counts = ", ".join(f"{images:,}" for images in (1, 100, 10_000))
    pooled = ", seeds pooled" if max(len(model.runs) for model in models) > 1 else ""
    write_footnote(
        figure,
        f"{where(models)}; {NUM_BINS} bins{pooled}; error bars: 95 % binomial interval of the bin's images, faint "
        f"where they are fewer than {FEW_IMAGES}; area grows with the logarithm of a bin's images ({counts})"
        f"{_not_shown(found, models)}",
    )
    return figure


def expert_load(results: Results) -> Figure | None:
    """Per MoE, first seed: every expert's share of the load over training, and of each class in the end."""
    found = [model for model in results.models if model.runs[0].expert_by_class and model.runs[0].curves]
    models = _one_per_family_first(found, MAX_MOE_VARIANTS)
    if not models:
        return None
    class_name = "digit" if models[0].runs[0].dataset in {"mnist", "qmnist", "digits"} else "class"
    titles = [
        wrap(f"{model.short_name}: {what}", 5, 10)
        for model in models
        for what in ("load over training", f"who gets which {class_name}, test images")
    ]
    size = (12, (3.6 + extra_height(titles)) * len(models) + 0.9)
    figure, panels = make_figure(results.records, "Expert load", rows=len(models), columns=2, size=size)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
    for model, load_axes, class_axes in zip(models, panels[::2], panels[1::2], strict=True):
        record = model.runs[0]
        _draw_load(load_axes, record)
        by_expert = 100 * np.array(record.expert_by_class).T
        draw_heatmap(
            class_axes,
            by_expert,
            x_labels=_class_names(record, by_expert.shape[1]),
            y_labels=range(len(by_expert)),
            texts=[[f"{share:.0f}" for share in shares] for shares in by_expert]
            if len(by_expert) <= 12 and by_expert.shape[1] <= MANY_CLASSES
            else (),
            low=0,
            bar_label=f"share of the {class_name}'s test pairs (%)",
        )
        class_axes.set(xlabel=class_name, ylabel="expert")
        _turn_long_names(class_axes)
    seeds = {model.runs[0].seed for model in models}
    first_seed = f"first seed ({seeds.pop()})" if len(seeds) == 1 else "first seed of each model"
    write_footnote(figure, f"{first_seed}; a pair is one image at one of its experts{_not_shown(found, models)}")
    return figure


def confusion_matrices(results: Results) -> Figure | None:
    """Which classes a model's first seed takes for which: errors shaded, and counted above one; right ones blank."""
    found = [model for model in results.models if model.num_images]
    models = found[:MAX_PANELS]
    if not models:
        return None
    columns = min(5, len(models))
    labels = [wrap(model.label, 2.8, 9) for model in models]
    size = (max(6, 3.1 * columns), (3.7 + extra_height(labels)) * math.ceil(len(models) / columns) + 0.8)
    figure, panels = make_figure(results.records, "Test errors by class", cells=len(models), columns=columns, size=size)
    errors = {model.name: np.array(model.measurements[0].confusion) for model in models}
    for matrix in errors.values():
        np.fill_diagonal(matrix, 0)
    highest = max(1, *(int(matrix.max()) for matrix in errors.values()))
    for place, (axes, model, label) in enumerate(zip(panels, models, labels, strict=True)):
        matrix = errors[model.name]
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=highest)
        num_classes = len(matrix)
        for true, predicted in np.argwhere(matrix > 1) if num_classes <= MANY_CLASSES else ():
            count = matrix[true, predicted]
            color = "white" if count > 0.6 * highest else "black"
            points = min(6.5, 110 / num_classes)
            text = axes.text(predicted, true, str(count), ha="center", va="center", fontsize=points, color=color)
            text.set_in_layout(False)  # hundreds of texts inside their cells, which no layout need measure
        classes, names = range(num_classes), _class_names(model.runs[0], num_classes)
        axes.set_xticks(*((classes, names) if place + columns >= len(models) else ([], [])))
        axes.set_yticks(*((classes, names) if place % columns == 0 else ([], [])))
        axes.grid(visible=False)
        axes.scatter(classes, classes, marker="s", s=min(100, 3000 / num_classes**2), color="#d9d9d9", linewidths=0)
        axes.tick_params(labelsize=8 if num_classes <= 15 else 5.5, length=0)
        _turn_long_names(axes)
        axes.set_title(f"{label}\n{matrix.sum()} errors", fontsize=9)
    label_outer(panels, columns, "predicted", "true")
    single = "; shaded without a number: one image" if len(matrix) <= MANY_CLASSES else ""
    note = f"first seed of each model; grey: right predictions, not counted{single}"
    write_footnote(figure, f"{where(models)}; {note}{_not_shown(found, models)}")
    return figure


def _class_names(record: Record, num_classes: int) -> list[str]:
    """A tick each: of very many classes only some have room for their names."""
    names = record.class_names if len(record.class_names) == num_classes else [str(n) for n in range(num_classes)]
    short = [name if len(name) <= MAX_CLASS_NAME else f"{name[:4]}…{name[5 - MAX_CLASS_NAME :]}" for name in names]
    step = math.ceil(num_classes / MANY_CLASSES)
    return [name.replace("$", r"\$") if place % step == 0 else "" for place, name in enumerate(short)]


def _turn_long_names(axes: Axes) -> None:
    """Let the names along the lower edge stand upright where they would touch."""
    labels = axes.get_xticklabels()
    if sum(len(label.get_text()) for label in labels) > MANY_CLASSES:
        for label in labels:
            label.set_rotation(90)


def _one_per_family_first(models: Sequence[Model], num: int) -> list[Model]:
    """At most so many, in their order; a family's second model only where every family has its first."""
    families: list[str] = []
    rounds = {}
    for model in models:
        rounds[model.name] = families.count(model.family)
        families.append(model.family)
    chosen = sorted(rounds, key=lambda name: rounds[name])[:num]
    return [model for model in models if model.name in chosen]


def _not_shown(found: Sequence[Model], shown: Sequence[Model]) -> str:
    return f"; {len(found) - len(shown)} more models not shown" if len(found) > len(shown) else ""


def _draw_curve(axes: Axes, model: Model, value_of: Callable[[Epoch], float]) -> None:
    curves = [{epoch["epoch"]: value_of(epoch) for epoch in record.curves} for record in model.runs]
    by_seed = pd.DataFrame(curves).T.sort_index().dropna(how="all")
    if len(by_seed.columns) > 1:
        axes.plot(by_seed.index, by_seed, color=model.look.color, linewidth=0.6, alpha=0.5)
    look = model.look.line | {"markersize": 4.5, "markeredgewidth": 1}
    axes.plot(by_seed.index, by_seed.mean(axis=1), **look, linewidth=1.6, markevery=max(1, len(by_seed) // 10))


def _has_bins(model: Model) -> bool:
    return all(measurement.bins for measurement in model.measurements)


def _bins(model: Model, key: str) -> Values:
    """Of every seed: [seed][bin]."""
    return np.array([measurement.bins[key] for measurement in model.measurements], dtype=float)


def _teacher_of(model: Model) -> str:
    """The one model beside it that it learned from; empty where there are several, or it lies elsewhere."""
    teachers = [parent for role, parent in model.runs[0].parents.items() if role != "source"]
    is_beside = len(teachers) == 1 and "/" not in teachers[0]["file"]
    return teachers[0]["model"] if is_beside else ""


def _draw_confidences(axes: Axes, model: Model, title: str) -> None:
    """Shares of the images by confidence: the seeds' mean, and from the lowest to the highest."""
    counts, sums = _bins(model, "count"), _bins(model, "confidence_sum")
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    mean, low, high = shares.mean(axis=0), shares.min(axis=0), shares.max(axis=0)
    edges = 100 * np.arange(NUM_BINS + 1) / NUM_BINS
    axes.bar(
        edges[:-1], mean, width=100 / NUM_BINS, align="edge", color=model.look.color, alpha=0.75, edgecolor="white"
    )
    if len(counts) > 1:
        drawn = mean > 0
        centers = (edges[:-1] + edges[1:]) / 2
        bars = spread(mean, low, high)[:, drawn]
        axes.errorbar(centers[drawn], mean[drawn], bars, fmt="none", ecolor=MUTED, elinewidth=1, capsize=2)
    axes.set_title(f"{title}\nmean confidence {100 * sums.sum() / counts.sum():.2f} %", fontsize=10)
    axes.set(xlabel="probability of the predicted class (%)", xlim=(0, 100))
    make_logarithmic(axes, "y", "")


def _draw_reliability(axes: Axes, model: Model) -> None:
    """A point per bin with its binomial interval, faint where the bin has few images."""
    count, confidence_sum, correct = (_bins(model, key).sum(axis=0) for key in ("count", "confidence_sum", "correct"))
    axes.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1)
    for chosen, alpha in ((count >= FEW_IMAGES, 1.0), ((count > 0) & (count < FEW_IMAGES), 0.35)):
        if not chosen.any():
            continue
        confidence = 100 * confidence_sum[chosen] / count[chosen]
        accuracy = 100 * correct[chosen] / count[chosen]
        ends = [binomial_interval(k / n, int(n)) for k, n in zip(correct[chosen], count[chosen], strict=True)]
        bars = spread(accuracy, *100 * np.array(ends).T)
        axes.errorbar(confidence, accuracy, bars, fmt="none", ecolor=MUTED, elinewidth=1, capsize=2, alpha=alpha)
        area = 8 + 30 * np.log10(count[chosen] / len(model.runs) + 1)
        axes.scatter(
            confidence, accuracy, s=area, facecolors=model.look.face, edgecolors=model.look.color, alpha=alpha, zorder=3
        )


def _draw_load(axes: Axes, record: Record) -> None:
    epochs = [epoch["epoch"] for epoch in record.curves]
    loads = 100 * np.array([epoch["expert_load"] for epoch in record.curves])
    num_experts = loads.shape[1]
    for expert in range(num_experts):
        marker = MARKERS[expert % len(MARKERS)]
        axes.plot(epochs, loads[:, expert], marker=marker, color=COLORS[expert % len(COLORS)], label=f"expert {expert}")
    axes.axhline(100 / num_experts, color=MUTED, linestyle="--", label=f"even share, {100 / num_experts:.3g} %")
    if num_experts <= 12:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xlabel="epoch", ylabel="share of training pairs (%)", ylim=(0, 1.1 * loads.max()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
