# SPDX-License-Identifier: Apache-2.0
"""`quantization_config` of config.json, by an allow-list of our own, without torch.

An unsupported method or scheme is refused here, by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable

from wavetrain_engine.config_reader import ConfigReader
from wavetrain_engine.errors import ConfigError, UnsupportedModelError
from wavetrain_engine.quantization.awq_config import parse_awq
from wavetrain_engine.quantization.bitsandbytes_config import parse_bitsandbytes
from wavetrain_engine.quantization.compressed_tensors_config import parse_compressed_tensors
from wavetrain_engine.quantization.fp8_config import parse_fp8
from wavetrain_engine.quantization.gptq_config import parse_gptq
from wavetrain_engine.quantization.stored_format import QuantizationConfig

_KEY, _OLD_KEY = "quantization_config", "compression_config"

# A new method is one entry here, and one in `decode`.
_PARSERS: dict[str, Callable[[ConfigReader, str], QuantizationConfig]] = {
    "compressed-tensors": parse_compressed_tensors,
    "gptq": parse_gptq,
    "awq": parse_awq,
    "fp8": parse_fp8,
    "bitsandbytes": parse_bitsandbytes,
}

METHODS = tuple(_PARSERS)


def parse_quantization(config: ConfigReader) -> QuantizationConfig | None:
    """Reads what a config.json says of quantization; None: the checkpoint is not quantized.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range.
        UnsupportedModelError: a method or scheme that is not served.
    """
    found = [key for key in (_KEY, _OLD_KEY) if config.mapping(key)]
    if not found:
        return None
    if len(found) == 2 and config.mapping(_KEY) != config.mapping(_OLD_KEY):
        raise ConfigError(f"config.json: {_KEY} and {_OLD_KEY} are two names of one thing, but differ")
    where = f"config.json: {found[0]}"
    values = ConfigReader(config.mapping(found[0]), where)
    # compressed-tensors did not name itself at first.
    method = values.string(
        "quant_method", "compressed-tensors" if "config_groups" in config.mapping(found[0]) else None
    )
    if method not in _PARSERS:
        raise UnsupportedModelError(
            f"{where}: quant_method {method[:40]!r} is not supported; supported are {', '.join(METHODS)}"
        )
    return _PARSERS[method](values, where)
