"""How long recorded answers are: lengths at a hundred quantiles, and the share of all tokens in the answers up to each. One JSON.

    python studies/lengths.py --data ../shared/data
"""
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from common import write

WORKLOADS = {  # name → file and model
    "davinci-003, Alpaca": ("alpaca_davinci003", "text-davinci-003"),
    "Llama-3.1-8B, Alpaca": ("castillo_alpaca", "Llama-3.1-8B-Instruct"),
    "Llama-3.1-8B, ShareGPT": ("castillo_sharegpt", "Llama-3.1-8B-Instruct"),
    "Llama-3.1-8B, MMLU-Pro": ("mmlu_pro_cot", "Meta-Llama-3_1-8B-Instruct"),
    "R1-Distill-Qwen-7B, math": ("reason_math500_gsm8k", "DeepSeek-R1-Distill-Qwen-7B"),
}


def main(data: Annotated[Path, typer.Option(help="folder of recorded lengths")]) -> None:
    "Every recorded answer of each workload counts once, also where a prompt has several."
    share, out = np.round(np.arange(1, 101) / 100, 2), {}
    for name, (file, model) in WORKLOADS.items():
        rows = pd.read_parquet(data / f"{file}.parquet")
        length = np.sort(rows[rows.model == model].response_tokens.to_numpy())
        last = np.ceil(share * len(length)).astype(int) - 1
        out[name] = dict(answers=len(length), tokens=length[last].tolist(), work=np.round(length.cumsum()[last] / length.sum(), 4).tolist())
        print(f"{name:26} p50 {length[last[49]]:5}, p99 {length[last[98]]:6}; the longest tenth holds {1 - out[name]['work'][89]:.0%} of the tokens")
    write("real/lengths", share=share.tolist(), workloads=out)


if __name__ == "__main__":
    typer.run(main)
