"""Pipelines: from text to rows, what is refused, and a chain in the making."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_dataset, make_lab

from mnist_lab.compress.distill import Distil, DistillationConfig
from mnist_lab.compress.finetune import Duration, Finetuning
from mnist_lab.compress.int8 import Calibration, DynamicInt8, StaticInt8
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.compress.prune_experts import ExpertPruning, PruneExperts
from mnist_lab.compress.prune_neurons import NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_weights import share_of_zeros
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.compress.refine import Refine
from mnist_lab.compress.weight_only import AsTrained, Method, WeightOnly
from mnist_lab.errors import UserError
from mnist_lab.experiments import make as make_module
from mnist_lab.experiments.against_original import kept_experts
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import load_or_make, make
from mnist_lab.experiments.pipeline import LINKS, parse_pipeline, parse_pipelines
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import COMPRESSION, FFN, MOE, STUDENT, small_from_scratch
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models.ffn import Windows
from mnist_lab.models.small import SmallShape

EXAMPLE = "experts keep=2 > neurons 0.5 > distil self > qat bits=4"


def names(text: str) -> list[str]:
    return [row.name for row in parse_pipeline(text)]


def last(text: str) -> Row:
    return parse_pipeline(text)[-1]


def test_a_chain_goes_from_row_to_row_and_ends_as_it_is_deployed() -> None:
    rows = parse_pipeline(EXAMPLE)
    assert [row.family for row in rows] == [
        "Sparse_MoE",
        "Sparse_MoE_fewer_experts",
        "Sparse_MoE_fewer_experts_narrower",
        "Sparse_MoE_fewer_experts_narrower_refined",
        "Sparse_MoE_fewer_experts_narrower_refined_QAT_FP32",
        "Sparse_MoE_fewer_experts_narrower_refined_QAT",
    ]
    assert [row.source for row in rows] == [None, *rows[:-1]]
    assert [row.teacher for row in rows] == [None, None, None, MOE, None, None]
    assert [type(row.step) for row in rows[1:5]] == [PruneExperts, PruneNeurons, Refine, TrainQuantized]
    assert rows[-1].form == AsTrained(Rounding(4))
    assert rows[-1].technique == "moe + pruned experts + pruned neurons + kd + qat"


def test_what_learned_in_few_bits_goes_on_in_float() -> None:
    assert names("qat 2 > neurons 0.75 > int8") == [
        "Sparse_MoE",
        "Sparse_MoE_QAT_FP32-b2",
        "Sparse_MoE_QAT_FP32_narrower-0.75+b2",
        "Sparse_MoE_QAT_FP32_narrower_INT8-0.75+b2",
    ]
    twice = parse_pipeline("layers 4 > qat 2")
    assert [type(row.step) for row in twice[1:3]] == [TrainQuantized, TrainQuantized]
    assert twice[-1].form == AsTrained(Rounding(2))


@pytest.mark.parametrize(
    ("link", "technique"),
    [
        ("neurons", PruneNeurons()),
        (
            "neurons 0.75 criterion=taylor finetune-epochs=4 teacher=self",
            PruneNeurons(NeuronPruning(0.75, "taylor"), Finetuning(4, "self")),
        ),
        ("experts criterion=exact keep=1", PruneExperts(ExpertPruning(1, "exact"))),
        (
            "distil temperature=2 finetune_epochs=3",
            Refine(Duration(3), replace(Refine().distillation, temperature=2.0)),
        ),
        (
            "qat ternary group-size=64 first-layer-bits=2 router-bits=none teacher=self",
            TrainQuantized(Quantization(Rounding("ternary", 64, 2)), Learning(teacher="self")),
        ),
        ("layers 2", TrainQuantized(Quantization(Rounding(2), learn="layers"))),
        ("round bits=3 group-size=channel scheme=affine", WeightOnly(Rounding(3), Method(scheme="affine"))),
        ("mixed size-budget=99.5 allocation=even", MixedBits(99.5, allocation="even")),
        ("int8", StaticInt8()),
        ("int8 static calibration-size=50", StaticInt8(Calibration(50))),
        ("int8 mode=dynamic", DynamicInt8()),
    ],
)
def test_settings_are_those_of_the_dataclasses(link: str, technique: object) -> None:
    row = parse_pipeline(f"moe > {link}")[1]
    assert technique == (row.step or row.form)


@pytest.mark.parametrize("link", LINKS)
def test_every_link_alone_follows_the_moe(link: str) -> None:
    rows = parse_pipeline(link + (" h8" if link == "small" else ""))
    assert rows[0] == MOE
    assert MOE in {rows[1].source, rows[1].teacher}


def test_small_students_begin_a_chain_or_learn_from_the_model_before() -> None:
    shape = SmallShape((), 2, (Windows(4, 5, 2),))
    assert parse_pipeline("pool2-w4x5s2 > qat 4")[0] == small_from_scratch(shape)
    taught = parse_pipeline("experts 2 > small pool2-w4x5s2 temperature=5 > round 4")[2]
    assert taught.source is None
    assert taught.teacher == last("experts 2")
    assert taught.step == Distil(DistillationConfig(temperature=5.0), shape)
    assert names("small h8 > qat 4")[1:] == ["KD_small-h8", "KD_small_QAT_FP32-h8", "KD_small_QAT-h8"]
    assert taught.family == "KD_small_from_Sparse_MoE_fewer_experts"


def test_who_teaches_and_where_a_chain_starts() -> None:
    assert last("ffn > neurons > distil").teacher == FFN
    assert last("student > distil self").teacher == STUDENT
    assert last("ffn > distil teacher=moe").teacher == MOE
    assert last("distil moe") == last("distil self")  # the chain's own original
    assert names("ffn > distil moe > int8 dynamic") == [
        "FFN_baseline",
        "FFN_baseline_refined-moe",
        "FFN_baseline_refined_INT8-dynamic-moe",
    ]


def test_rows_are_the_suites_own_where_it_has_them() -> None:
    found = {*parse_pipeline("neurons 0.75 teacher=self > int8"), *parse_pipeline("qat 2 teacher=self")[:1]}
    assert found <= set(COMPRESSION)
    assert last("qat 2 teacher=self") in COMPRESSION


def test_rows_of_several_pipelines_come_once_after_their_originals_and_teachers() -> None:
    rows = parse_pipelines((EXAMPLE, "experts 2 > qat 2", "student > neurons 0.5 > distil ffn"))
    assert rows[:2] == (FFN, MOE)
    assert len(set(rows)) == len(rows)
    for place, row in enumerate(rows):
        assert all(parent in rows[:place] for parent in row.parents.values())


def test_chains_that_differ_have_rows_of_other_names() -> None:
    weights = ["weights", "weights 0.9", "weights teacher=self", "weights 0.9 teacher=self"]
    neurons = ["neurons", "neurons 0.9", "neurons teacher=self", "neurons 0.9 teacher=self"]
    ends = ["", " > int8", " > distil", " > distil ffn", " > qat 2", " > qat 2 teacher=self", " > round 2"]
    rows = {row for one in weights for two in neurons for end in ends for row in parse_pipeline(f"{one} > {two}{end}")}
    assert len({row.name for row in rows}) == len(rows)
    assert names("weights 0.9 > neurons")[-1] == "Sparse_MoE_pruned_narrower+0.9"
    assert names("experts 1 > neurons > qat 2")[-1] == "Sparse_MoE_fewer_experts_narrower_QAT-b2++1"


def test_names_of_files_are_short_or_the_pipeline_is_too_long() -> None:
    links = ["experts 3 criterion=exact", "neurons 0.75 widths=alike teacher=self", "merge 2 group=outputs", "distil"]
    longest = (
        f"{last(' > '.join([*links, 'qat ternary teacher=self'])).name}-epochs3-bs64-seed4294967295.fit1.safetensors"
    )
    assert len(longest) < 200
    with pytest.raises(UserError, match="is too long"):
        parse_pipeline(" > ".join(["distil"] * 20))


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ("", '--pipeline "" has no link; there are weights, neurons, router,'),
        (" > ", '--pipeline " > " has no link'),
        ("moe", '--pipeline "moe" has no link'),
        ("experts 2 > > qat", 'link 2, "": it is empty'),
        ("experts 2 > qat >", 'link 3, "": it is empty'),
        ("prune 0.5", 'link 1, "prune 0.5": there is no link prune; there are weights, neurons, router,'),
        ("neurons > moe", 'link 2, "moe": moe is a model to start from: it comes first, alone'),
        ("moe 3 > qat", 'link 1, "moe 3": moe is a model to start from'),
        ("experts 2 > neurons 1.5", 'link 2, "neurons 1.5": --ratio 1.5 must lie between 0 and 1, and be neither'),
        ("small > qat 4", 'link 1, "small": it needs a shape'),
        ("small x8 > qat 4", 'link 1, "small x8": x8 is no shape'),
        ("w8 > qat 4", 'link 1, "w8": w8 is no shape'),
        ("small h8 > experts 2", 'link 2, "experts 2": it takes a mixture'),
        ("neurons many", 'link 1, "neurons many": --ratio many must be a number'),
        ("experts 1.5", 'link 1, "experts 1.5": --keep 1.5 must be a whole number'),
        ("qat 5", 'link 1, "qat 5": --bits 5 must be 8, 4, 3, 2, ternary or 1'),
        ("qat router-bits=3", 'link 1, "qat router-bits=3": --router-bits 3 must be 8, 4, 2 or none'),
        ("distil bob", 'link 1, "distil bob": --teacher bob must be self, moe or ffn'),
        (
            "experts kep=2",
            'link 1, "experts kep=2": there is no setting kep; there are keep, criterion, train, finetune-epochs, ',
        ),
        ("bf16 x=1", 'link 1, "bf16 x=1": there is no setting x; there are none'),
        ("qat learn=layers", "there is no setting learn"),
        ("qat 4 bits=4", 'link 1, "qat 4 bits=4": bits is given twice'),
        ("qat group-size=32 group_size=32", "group-size is given twice"),
        ("distil self teacher=self", "teacher is given twice"),
        ("qat 4 8", 'link 1, "qat 4 8": 8 is no key=value'),
        ("mixed 3", 'link 1, "mixed 3": 3 is no key=value'),
        ("mixed size-budget=90 mean-bits=3", "--size-budget and --mean-bits are two ways to say the same"),
        ("layers teacher=self", 'link 1, "layers teacher=self": --learn layers has the trained'),
        ("distil finetune-epochs=0", "--finetune-epochs 0 would teach it nothing"),
        ("ffn > experts 2", 'link 2, "experts 2": it takes a mixture, and the model before it has no experts'),
        ("student > router", "it takes a mixture"),
        ("experts 1 > merge 1", "it takes a mixture"),
        ("merge 1 > share", "it takes a mixture"),
        ("merge 1 > fused", "it takes a mixture"),
        ("ffn > weights allocation=utilization", "--allocation utilization shares out among experts: there are none"),
        ("experts 1 > qat router-bits=4", "--router-bits 4: the model before it has no router"),
        ("ffn > round router-bits=4", "--router-bits 4: the model before it has no router"),
        ("experts 4", "--keep 4 must be less than the 4 experts that there are"),
        ("merge 2 > experts 2", 'link 2, "experts 2": --keep 2 must be less than the 2 experts that there are'),
        ("experts 1 train=router", "--train router: the one expert of --keep 1 needs none"),
        ("share > neurons", 'link 2, "neurons": the experts before it share a base, which it cannot keep'),
        ("share > weights", "share a base"),
        ("share > experts 2 > share", "share a base"),
        ("share > qat", "share a base"),
        ("share > fused", "share a base"),
        ("neurons > merge", "it takes experts of one width: give neurons, before it, widths=alike"),
        ("neurons > experts 2 > share", "it takes experts of one width"),
        ("neurons > qat 1", "it takes experts of one width"),
        ("int8 > qat", 'link 2, "qat": nothing can follow a form, and the link before makes INT8 files'),
        ("mixed > distil", "the link before makes mixed files"),
        ("qat > round", 'link 2, "round": what learned in few bits is deployed in those, and in no other form'),
        ("layers > int8", "what learned in few bits is deployed in those"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_that_names_the_link(pipeline: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_pipeline(pipeline)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_another_link_has_mended_is_not_refused() -> None:
    for pipeline in (
        "share > experts 1 > neurons > weights",
        "neurons > experts 1 > qat 1",
        "neurons widths=alike > merge > share",
        "share > router > distil > mixed",
    ):
        parse_pipeline(pipeline)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path, dataset=make_dataset(num_train=1000))


def make_chain(lab: Lab, pipeline: str) -> list[Run]:
    runs = [Run(lab, row, 0) for row in parse_pipeline(pipeline)]
    for run in runs:
        load_or_make(run)
    return runs


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_and_a_finished_one_trains_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = replace(lab, recipe=replace(lab.recipe, epochs=1))
    pipeline = "experts 2 > distil > qat 2"

    def interrupt(self: Refine, work: Work) -> Made:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Refine, "make", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_chain(lab, pipeline)
    before = {path: path.stat().st_mtime_ns for path in lab.checkpoints.iterdir()}
    assert {path.name.partition("-")[0] for path in before} == {"Sparse_MoE", "Sparse_MoE_fewer_experts"}
    runs = make_chain(lab, pipeline)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    record = load_or_make(runs[-1])
    assert (record.original, record.precision) == ("Sparse_MoE-epochs1", "INT2")
    assert record.proof is not None
    assert record.proof["stored"]["2"] == 5  # the stem, and both layers of each expert
    monkeypatch.setattr(make_module, "produce", None)  # would fail if they were called
    monkeypatch.setattr(make_module, "measure_run", None)
    make_chain(lab, pipeline)


@pytest.mark.slow
def test_zeros_stay_in_what_follows_and_the_teacher_is_the_original(lab: Lab) -> None:
    lab = replace(lab, recipe=replace(lab.recipe, epochs=1))
    runs = make_chain(lab, "ffn > weights 0.9 > distil > qat 4")
    zeros = [share_of_zeros(run.load()) for run in runs[:4]]
    assert zeros[0] < 0.01
    assert zeros[1] == pytest.approx(0.9, abs=0.001)
    assert zeros[2] == zeros[1]
    assert zeros[3] >= zeros[1]
    record = load_or_make(runs[2])
    assert record.parents.keys() == {"source", "teacher"}
    assert record.parents["teacher"]["model"] == "FFN_baseline-epochs1"
    assert record.technique == "pruned weights + kd"
    assert record.curves[0]["train_terms"].keys() == {"distillation", "cross_entropy"}


@pytest.mark.slow
def test_experts_are_named_as_the_original_has_them_all_along_the_chain(lab: Lab) -> None:
    lab = replace(lab, recipe=replace(lab.recipe, epochs=1))
    three, two, distilled = make_chain(lab, "experts 3 > experts 2 > distil finetune-epochs=1")[1:]
    proofs = [make(run).proof for run in (three, two)]
    assert all(proofs)
    first, second = ([*proof["kept"]] for proof in proofs if proof)
    expected = [first[expert] for expert in second]
    assert kept_experts(two, {"kept": second}) == expected
    assert kept_experts(distilled, {}) == expected
    assert kept_experts(Run(lab, MOE, 0), {}) is None
    figures = load_or_make(distilled).against_original
    assert figures is not None
    assert 0 < figures["top1_agreement"] <= 1
