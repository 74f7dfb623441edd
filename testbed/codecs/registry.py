"""Which methods there are: one line a method. Adding one is a new file and its line here."""

from __future__ import annotations

from dataclasses import dataclass

from testbed.codecs.method import Method
from testbed.codecs.select.press import PREFIX, Press, find_press, presses, unavailable
from testbed.kinds import Parameter, load, parameters

SELECTORS = {
    "q2c": "testbed.codecs.select.q2c:Q2C",
    "snapkv": "testbed.codecs.select.snapkv:SnapKV",
    "h2o": "testbed.codecs.select.h2o:H2O",
    "tova": "testbed.codecs.select.tova:TOVA",
    "expected": "testbed.codecs.select.expected:Expected",
    "keynorm": "testbed.codecs.select.keynorm:KeyNorm",
    "pyramid": "testbed.codecs.select.pyramid:Pyramid",
    "adaptive": "testbed.codecs.select.adaptive:Adaptive",
    "window": "testbed.codecs.select.window:Window",
    "random": "testbed.codecs.select.random:Random",
    "oracle": "testbed.codecs.select.oracle:Oracle",
    "keydiff": "testbed.codecs.select.keydiff:KeyDiff",
    "lagkv": "testbed.codecs.select.lagkv:LagKV",
    "leverage": "testbed.codecs.select.leverage:Leverage",
    "compactor": "testbed.codecs.select.compactor:Compactor",
    "finch": "testbed.codecs.select.finch:Finch",
    "simlayer": "testbed.codecs.select.simlayer:SimLayer",
    "kvzip": "testbed.codecs.select.kvzip:KVzip",
    "qfilters": "testbed.codecs.select.qfilters:QFilters",
    "chunk": "testbed.codecs.select.chunk:Chunk",
    "critical": "testbed.codecs.select.critical:Critical",
    "perhead": "testbed.codecs.select.perhead:PerHead",
    "perlayer": "testbed.codecs.select.perlayer:PerLayer",
    "rerotate": "testbed.codecs.select.rerotate:Rerotate",
    "cake": "testbed.codecs.select.cake:Cake",
    "merge": "testbed.codecs.select.merge:Merge",
}
TRANSFORMS = {
    "delta": "testbed.codecs.transform.delta:Delta",
}
QUANTIZERS = {
    "fp16": "testbed.codecs.quantize.fp16:FP16",
    "int8": "testbed.codecs.quantize.integer:Int8",
    "int4": "testbed.codecs.quantize.integer:Int4",
    "int3": "testbed.codecs.quantize.integer:Int3",
    "int2": "testbed.codecs.quantize.integer:Int2",
    "fp8": "testbed.codecs.quantize.fp8:FP8",
    "kivi": "testbed.codecs.quantize.kivi:Kivi",
    "normsep": "testbed.codecs.quantize.normsep:NormSep",
    "turbo": "testbed.codecs.quantize.turbo:Turbo",
    "kvquant": "testbed.codecs.quantize.kvquant:KVQuant",
    "cachegen": "testbed.codecs.quantize.cachegen:CacheGen",
    "mixed": "testbed.codecs.quantize.mixed:Mixed",
    "planes": "testbed.codecs.quantize.planes:Planes",
    "think": "testbed.codecs.quantize.think:ThinK",
    "lossless": "testbed.codecs.quantize.lossless:Lossless",
    "lowrank": "testbed.codecs.quantize.lowrank:LowRank",
    "kvtc": "testbed.codecs.quantize.kvtc:KVTC",
    "gear": "testbed.codecs.quantize.gear:Gear",
    "best": "testbed.codecs.quantize.best:Best",
}
CODERS = {
    "zstd": "testbed.codecs.entropy.zstd:Zstd",
    "lz4": "testbed.codecs.entropy.lz4:LZ4",
    "ans": "testbed.codecs.entropy.ans:ANS",
}
STAGES = {"selector": SELECTORS, "transform": TRANSFORMS, "quantizer": QUANTIZERS, "coder": CODERS}


@dataclass(frozen=True)
class Description:
    """What `testbed codecs` prints of one method. `takes_ratio`: it is written ``name@ratio``.

    `unavailable`: why it cannot be used here; empty where it can.
    """

    stage: str
    name: str
    summary: str
    takes_ratio: bool
    parameters: tuple[Parameter, ...]
    source: str
    unavailable: str = ""


def stage_of(name: str) -> str | None:
    """The stage a method belongs to; None for a name that is not registered."""
    if name.startswith(PREFIX):
        return "selector"
    return next((stage for stage, table in STAGES.items() if name in table), None)


def find(name: str) -> type[Method]:
    """The class of a registered method. Only modules of the tables above are ever imported, and kvpress for its presses.

    Raises KeyError, and SpecError for a press that is not there.
    """
    if name.startswith(PREFIX):
        return find_press(name)
    stage = stage_of(name)
    if stage is None:
        raise KeyError(name)
    method: type[Method] = load(STAGES[stage][name])
    return method


def describe() -> list[Description]:
    """Every method, stage by stage in the order of the tables; behind the selectors, kvpress's presses."""
    found = []
    for stage, table in STAGES.items():
        methods = [find(name) for name in table]
        if stage == "selector":
            methods += presses() or [Press]
        found += [_described(stage, method) for method in methods]
    return found


def _described(stage: str, method: type[Method]) -> Description:
    fields = parameters(method)
    return Description(
        stage=stage,
        name=method.name,
        summary=(method.__doc__ or "").strip().partition("\n")[0],
        takes_ratio=any(field.name == "ratio" for field in fields),
        parameters=tuple(field for field in fields if field.name != "ratio"),
        source=method.source,
        unavailable=unavailable() if issubclass(method, Press) else "",
    )
