"""Which settings of the runs each published claim compares, and by which rule: codecs are told apart as they are parsed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.claims import rules
from testbed.analysis.claims.pool import CONCENTRATED, DISTRIBUTED, ROBUST, Pool
from testbed.analysis.claims.rules import Verdict
from testbed.codecs.method import Method
from testbed.codecs.quantize.mixed import Mixed, coarse
from testbed.codecs.spec import CodecSpec, parse
from testbed.errors import SpecError
from testbed.experiment.row import SENDING

#: The mean ΔNLL, in nats a token, up to which a codec may stand for the full cache against sending the text.
WORTH_LOSS = 0.05
#: Of the claims on selection.
RATIO = 0.25
#: Of the claim on scouts: the share of tokens kept, and of those the least that both models choose.
SCOUTED, SHARED = 0.75, 0.84
_TIMES = rules.LEAST_TIMES

Judge = Callable[[Pool], Iterator[Verdict]]


@functools.cache
def parsed(setting: str) -> CodecSpec | None:
    """A setting's codec; None for a placement, or a codec beside a transport."""
    try:
        return parse(setting)
    except SpecError:
        return None


def codecs(table: pd.DataFrame) -> dict[CodecSpec, str]:
    """The codecs among the settings, and what each is called there."""
    named = {parsed(name): name for name in map(str, table["setting"].unique())}
    return {spec: name for spec, name in named.items() if spec is not None}


def as_published(selector: Any) -> bool:
    """Whether a selector ranks as the study's do: by its last layer alone, once for the whole cache."""
    return bool(selector.layers == "last")


def _selections(
    table: pd.DataFrame, name: str, published: bool | None = None
) -> Iterator[tuple[str, CodecSpec]]:
    for spec, setting in codecs(table).items():
        if spec.selector is None or spec.selector.name != name:
            continue
        if published is None or as_published(spec.selector) == published:
            yield setting, spec


def _rest(spec: CodecSpec) -> tuple[object, ...]:
    """What has to be equal where selectors are compared."""
    ratio = spec.selector and spec.selector.ratio  # type: ignore[attr-defined]
    return ratio, spec.transform, spec.quantizer, spec.coder


def selector(other: str, *, published: bool = False, aware: bool | None = None) -> Judge:
    """Each form of Q2C against each of another selector at one ratio, with the same rest of the codec; `published`: the study's
    forms, or the others; `aware`: opponents that saw the question, or not (None: both).
    """

    def judged(pool: Pool) -> Iterator[Verdict]:
        for sample in pool.samples():
            for ours, own in _selections(sample.table, "q2c", published):
                for theirs, spec in _selections(sample.table, other, published):
                    sees = bool(getattr(spec.selector, "question", False))
                    if _rest(own) == _rest(spec) and _rest(own)[0] == RATIO and aware in (None, sees):
                        yield rules.better(sample, ours, theirs)

    return judged


def _alone(table: pd.DataFrame, name: str) -> list[str]:
    """The settings that are this quantizer and nothing else, one for each form of it."""
    return [setting for spec, setting in codecs(table).items() if is_alone(spec, name)]


def is_alone(spec: CodecSpec, name: str) -> bool:
    """Whether a codec is this quantizer and nothing else."""
    return spec.methods == (spec.quantizer,) and spec.quantizer.name == name


def int8(pool: Pool) -> Iterator[Verdict]:
    """INT8 against the full cache."""
    for sample in pool.samples():
        for setting in _alone(sample.table, "int8"):
            yield rules.lossless(sample, setting)


def fragile(pool: Pool) -> Iterator[Verdict]:
    """Each form of INT4, each two models that have it."""
    having = {model: _alone(table, "int4") for model, table in pool.tables.items()}
    for setting in sorted(set(itertools.chain(*having.values()))):
        owners = [model for model, settings in having.items() if setting in settings]
        for models in itertools.combinations(owners, 2):
            verdict = rules.differs_between_models(pool.tables, setting, models)
            if verdict is not None:
                yield verdict


def _protections(table: pd.DataFrame) -> Iterator[tuple[str, str, list[str]]]:
    """(INT4 of the same scales, the diagnosed protection, its controls) of settings that differ in `protect` alone, of which the
    scenario names the diagnosed one first.
    """
    known = codecs(table)
    alike: dict[tuple[Method | None, ...], list[str]] = {}
    for spec, setting in known.items():
        if isinstance(spec.quantizer, Mixed) and spec.quantizer.protect != "none":
            bare = replace(spec, quantizer=replace(spec.quantizer, protect="none"))
            alike.setdefault((bare.selector, bare.transform, bare.quantizer, bare.coder), []).append(setting)
    for (chosen, transform, mixed, coder), (first, *others) in alike.items():
        assert isinstance(mixed, Mixed)
        plain = CodecSpec(chosen, transform, coarse(mixed.low, mixed.scale), coder)
        if others and plain in known:
            yield known[plain], first, others


def protected(pool: Pool) -> Iterator[Verdict]:
    """The half for damage that sits in few layers; without a diagnosis beside the rows, that is taken for granted."""
    for sample in pool.samples():
        if pool.damage.get(sample.model, CONCENTRATED) == CONCENTRATED:
            for plain, first, others in _protections(sample.table):
                yield rules.restored(sample, plain, first, others)


def unprotected(pool: Pool) -> Iterator[Verdict]:
    """The other half: where a diagnosis beside the rows says that the damage is spread, protecting a layer does nothing."""
    for sample in pool.samples():
        if pool.damage.get(sample.model) == DISTRIBUTED:
            for plain, first, _ in _protections(sample.table):
                yield rules.nothing_gained(sample, plain, first)


def guided(pool: Pool) -> Iterator[Verdict]:
    """What the published guide says to send, of a model whose diagnosis lies beside the rows: INT4 where it is robust, the
    diagnosed layers at 16 bits where the damage sits in few, INT8 where it is spread.
    """
    for sample in pool.samples():
        damage = pool.damage.get(sample.model, "")
        named = {
            ROBUST: _alone(sample.table, "int4"),
            CONCENTRATED: [first for _, first, _ in _protections(sample.table)],
            DISTRIBUTED: _alone(sample.table, "int8"),
        }
        for setting in named.get(damage, ()):
            verdict = rules.lossless(sample, setting)
            yield replace(verdict, what=f"{setting}, for damage that is {damage}")


def _deltas(table: pd.DataFrame) -> Iterator[tuple[str, str, CodecSpec]]:
    """(setting with delta, the same without, its codec)."""
    known = codecs(table)
    for spec, setting in known.items():
        if spec.transform is not None and spec.transform.name == "delta":
            plain = known.get(replace(spec, transform=None))
            if plain is not None:
                yield setting, plain, spec


def delta(pool: Pool) -> Iterator[Verdict]:
    """Each form of delta against the same codec without."""
    for sample in pool.samples():
        for setting, plain, _ in _deltas(sample.table):
            yield rules.worse(sample, setting, plain)


def spread(pool: Pool) -> Iterator[Verdict]:
    """The same by the bytes that a coder makes of it."""
    for model, rows in pool.by_model():
        for setting, plain, spec in _deltas(rows):
            if spec.coder is not None:
                saved, what = rules.saving(rows, setting, plain), f"bytes of {setting} against {plain}"
                yield rules.threshold(model, what, saved, 0.0, "the delta saves {:.1%} {}", below=True)


def coded(pool: Pool) -> Iterator[Verdict]:
    """Each codec with a coder of the registry against the same without."""
    for model, rows in pool.by_model():
        known = codecs(rows)
        for spec, setting in known.items():
            plain = known.get(replace(spec, coder=None))
            if spec.coder is not None and plain is not None:
                saved, what = rules.saving(rows, setting, plain), f"{setting} against {plain}"
                yield rules.threshold(model, what, saved, 0.2, "saves {:.1%} {}")


def scouts(pool: Pool) -> Iterator[Verdict]:
    """Each form of Q2C as another model's scout: the share of its choice that is the answering model's own, which is the share
    of all tokens kept where one of them chooses by chance.
    """
    figure = "{:.1%} of the choice is the model's own {}"
    for model, rows in pool.by_model():
        own = rows[(rows["placement"] == "scout") & (rows["edge_model"] != "")]
        for (scout, setting), chosen in own.groupby(["edge_model", "codec"], sort=False):
            spec = parsed(str(setting))
            if (
                spec is None
                or spec.selector is None
                or spec.selector.name != "q2c"
                or _rest(spec)[0] != SCOUTED
            ):
                continue
            found = chosen[chosen["choice_overlap"].notna()]
            share = stats.mean(found["choice_overlap"], settings.clusters(found))
            verdict = rules.threshold(model, f"{setting} by {scout}", share, SHARED, figure)
            yield replace(verdict, figures=f"{verdict.figures}; by chance {SCOUTED:.0%}")


def _beside(whole: stats.Estimate, text: str) -> str:
    """Another figure behind that of a verdict."""
    return "; " + text.format(f"{whole.value:.2g}", f"[{whole.low:.3g}, {whole.high:.3g}]")


def dominates(pool: Pool) -> Iterator[Verdict]:
    """The 16-bit cache on each link."""
    figure = "transmission takes {:.2g} times prefill and quantization {}"
    for model, rows in pool.timed():
        for panel, own in rows[rows["setting"] == "fp16"].groupby("panel", sort=False):
            share, whole = rules.transmission_share(own), rules.transmission_share(own, rules.COMPUTE)
            verdict = rules.threshold(model, f"fp16 on {panel}", share, 1.0, figure, examples=_TIMES)
            beside = _beside(whole, "{} times all compute {}")
            yield replace(verdict, figures=verdict.figures + beside)


def free(pool: Pool) -> Iterator[Verdict]:
    """Q2C alone, at each length of the context: the question belongs to the prefill, as published."""
    for model, rows in pool.timed():
        for setting, _ in _selections(rows, "q2c"):
            for task, own in rows[rows["setting"] == setting].groupby("task", sort=False):
                question = own["question_s"].astype(float)
                share = rules.geometric((own["select_s"] - question) / (own["prefill_s"] + question), own)
                whole = rules.geometric(own["select_s"] / own["prefill_s"], own)
                figure = "selection takes {:.2g} of the prefill of context and question {}"
                if question.isna().all():
                    figure = "what the question's pass takes of the selection was not measured"
                verdict = rules.threshold(model, setting, share, 0.05, figure, below=True, examples=_TIMES)
                beside = _beside(whole, "with the question's pass {} of the context's {}")
                yield replace(verdict, task=str(task), figures=verdict.figures + beside)


def worth(pool: Pool) -> Iterator[Verdict]:
    """The fastest KV setting that loses little against sending the text, on each link."""
    figure = "takes {:.2g} times as long {}"
    for model in pool.tables:
        rows = pool.of(model)
        for panel, own in rows[rows["e2e_s"].notna()].groupby("panel", sort=False):
            best = _fastest_alike(own[own["placement"].isin(SENDING)])
            if best is None or "cloud" not in set(own["setting"]):
                continue
            times = settings.at_home(own).groupby(["setting", "task", "example"])["e2e_s"].median()
            pairs = pd.DataFrame({"kv": times[best], "text": times["cloud"]}).dropna().reset_index()
            ratio = rules.geometric(pairs["kv"] / pairs["text"], pairs)
            what = f"{best} against sending the text, on {panel}"
            yield rules.threshold(model, what, ratio, 1.0, figure, below=True, examples=_TIMES)


def _fastest_alike(rows: pd.DataFrame) -> str | None:
    """The setting with the lowest median latency of those whose mean ΔNLL is small; None where none is."""
    rows = rows.assign(lost=rows["nll"] - rows["reference_nll"])
    means = rows.groupby("setting")[["lost", "e2e_s"]].agg({"lost": "mean", "e2e_s": "median"})
    alike = means[means["lost"] <= WORTH_LOSS]
    return str(alike["e2e_s"].idxmin()) if len(alike) else None


def grows(pool: Pool) -> Iterator[Verdict]:
    """Each form of Q2C against each SnapKV of its kind, over lengths."""
    for sample in pool.models():
        for ours, own in _selections(sample.table, "q2c"):
            for theirs, spec in _selections(sample.table, "snapkv", as_published(own.selector)):
                if _rest(own) == _rest(spec):
                    yield from filter(None, [rules.slope(sample, ours, theirs)])


def damage_grows(pool: Pool) -> Iterator[Verdict]:
    """Each form of INT4 against the full cache, over lengths."""
    for sample in pool.models():
        for setting in _alone(sample.table, "int4"):
            yield from filter(None, [rules.slope(sample, rules.FULL, setting)])
