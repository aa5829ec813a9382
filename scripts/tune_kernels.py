#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures launch configurations on this GPU and writes them where the kernels look for them.

    python3 scripts/tune_kernels.py                                  all, within nine minutes; again: goes on
    python3 scripts/tune_kernels.py --only attention --time-limit-s 300
    python3 scripts/tune_kernels.py --out $OUT/nvidia-h200.json      elsewhere, to be copied
    python3 scripts/tune_kernels.py --dry-run                        on a CPU, interpreted, a few candidates

The file is kernels/wavetrain_kernels/tuned/<device>.json. Nothing of it is needed: where it says nothing, the
heuristics in the launchers hold, and only what beats them by 2 % is written. Measured times are kept beside the file
until everything has been tried, so a run that was cut off goes on where it stopped. Exit status: 0; 3 where the time
was up before the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from gpu import machine

_TUNED = machine.ROOT / "kernels" / "wavetrain_kernels" / "tuned"
_FAMILIES = ("attention", "layer", "quantized", "moe", "lora")
_CUT_OFF = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(arguments)
    started = time.monotonic()
    machine.prepare(is_dry_run=args.dry_run)
    import torch

    from gpu.setting import Setting
    from gpu.tuner import Listener, Tuner
    from wavetrain_kernels.gpu.tuning import file_name

    setting = Setting.make(is_dry_run=args.dry_run)
    if args.dry_run and args.out is None:
        raise SystemExit("a dry run writes no configurations of ours: give --out")
    name = "dry run" if args.dry_run else torch.cuda.get_device_name(setting.device)
    tuner = Tuner(
        device_name=name,
        timer=setting.timer,
        out=args.out or _TUNED / file_name(name),
        deadline=started + args.time_limit_s,
        listener=Listener({}),
    )
    with torch.inference_mode():
        for family in args.only.split(","):
            if tuner.is_cut_off:
                break
            tuner.tune(family, list(_contests(family, setting)))
            setting.forget()
    tuner.finish()
    print(f"{'cut off' if tuner.is_cut_off else 'done'} after {time.monotonic() - started:.0f} s: {tuner.out}")
    return _CUT_OFF if tuner.is_cut_off else 0


def _contests(family: str, setting: Any) -> Any:
    from gpu.attention_contests import attention_contests
    from gpu.layer_contests import layer_contests, lora_contests
    from gpu.moe_contests import moe_contests
    from gpu.quantized_contests import quantized_contests

    makers = {
        "attention": attention_contests,
        "layer": layer_contests,
        "quantized": quantized_contests,
        "moe": moe_contests,
        "lora": lora_contests,
    }
    return makers[family](setting.dtype, setting.device, is_dry_run=setting.is_dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_families, default=",".join(_FAMILIES), help="comma-separated (%(default)s)")
    parser.add_argument("--out", type=Path, help="the file to write, and to go on with")
    parser.add_argument("--time-limit-s", type=float, default=540, help="for everything (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, in tiny sizes")
    return parser


def _families(text: str) -> str:
    unknown = [family for family in text.split(",") if family not in _FAMILIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(_FAMILIES)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
