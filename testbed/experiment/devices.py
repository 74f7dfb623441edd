"""What a scenario says of devices that are not here and of models that are a shape, looked up and held against each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

from testbed.codecs.spec import CodecSpec
from testbed.delivery.stream import Stream
from testbed.delivery.whole import Whole
from testbed.errors import SpecError
from testbed.experiment.compute import SIDES
from testbed.experiment.scenario import Scenario
from testbed.models.shapes import PREFIX, is_shape
from testbed.speed.files import Device, find, load_device


def look_up(scenario: Scenario, place: str) -> tuple[Scenario, dict[str, Device]]:
    """The scenario with each device's file where it is, and those device profiles by side. Raises SpecError."""
    devices, speeds = {}, {}
    for side in SIDES:
        speed = getattr(scenario.compute, side)
        if not speed.device:
            continue
        here = f"{place}: compute.{side}"
        try:
            path = find(speed.device)
            device = load_device(str(path))
        except SpecError as error:
            raise SpecError(f"{here}: {error}") from None
        _check_model(device, scenario, getattr(scenario.models, side), here)
        named = speed.device if path.stem == speed.device else str(path)
        decode = speed.decode if device.times.decode else None
        devices[side], speeds[side] = device, replace(speed, device=named, decode=decode)
    _check_extent(scenario, devices, place)
    _check_shape(scenario, devices, place)
    compute = scenario.compute.model_copy(update=speeds)
    return scenario.model_copy(update={"compute": compute}), devices


def _check_model(device: Device, scenario: Scenario, named: str, here: str) -> None:
    model = named.removeprefix(PREFIX)
    if device.times.model != model:
        raise SpecError(
            f"{here}: device {device.name} was measured for model {device.times.model}, and this one is {model}; take one of "
            f"`testbed devices` that has it, or make one: testbed device measure {model} --out FILE.yaml"
        )
    if is_shape(named):
        return
    # What a model says is computed before the clock runs, for which it has to be known what will arrive.
    if "scout" in scenario.placements:
        raise SpecError(
            f"{here}: device {device.name} is not waited for in placement 'scout' while model {model} computes; write model: "
            f"{PREFIX}{model}"
        )
    for delivery in scenario.delivery:
        if not isinstance(delivery, Whole | Stream):
            raise SpecError(
                f"{here}: device {device.name} is waited for with deliveries whole and stream; {str(delivery)!r} decides on "
                f"its way what model {model} computes; write model: {PREFIX}{model}"
            )
    if scenario.reuse != "all":
        raise SpecError(
            f"{here}: what device {device.name} is waited for is computed beforehand: that takes reuse: all"
        )


def _check_extent(scenario: Scenario, devices: dict[str, Device], place: str) -> None:
    """Contexts that are longer than what was measured are refused before anything runs."""
    for side, device in devices.items():
        for tokens in filter(None, scenario.context_tokens):
            try:
                device.times.pass_s(tokens)
                if device.times.decode:
                    device.times.token_s(tokens)
            except SpecError as error:
                raise SpecError(f"{place}: compute.{side}: {error}") from None


def _check_shape(scenario: Scenario, devices: dict[str, Device], place: str) -> None:
    shapes = {side: model for side in SIDES if is_shape(model := getattr(scenario.models, side))}
    if missing := [side for side in shapes if side not in devices]:
        raise SpecError(
            f"{place}: compute.{missing[0]}: model {shapes[missing[0]]} computes nothing, so each side needs a device's times: "
            "compute: {edge: device:NAME, cloud: device:NAME} (`testbed devices` lists them)"
        )
    codecs = [("codecs", codec) for codec in scenario.codecs]
    codecs += [("delivery", codec) for delivery in scenario.delivery for codec in delivery.codecs]
    for model, (key, codec) in itertools.product(shapes.values(), codecs):
        if why := needs_values(codec):
            raise SpecError(
                f"{place}: {key}: {str(codec)!r}: {why}, and those of model {model} only stand in"
            )


def needs_values(codec: CodecSpec) -> str:
    """What of a codec's bytes depends on a cache's values; empty: they follow from its shape alone."""
    coder = codec.coder or codec.quantizer.own_coder
    if coder is not None:
        return f"what coder {coder.name} makes of a cache depends on its values"
    needs = getattr(codec.selector, "needs", None)
    if needs is not None and needs().context_inputs:
        return f"selector {codec.selector.name} looks at the model's hidden states"  # type: ignore[union-attr]
    return ""
