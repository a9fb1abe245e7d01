# Two commands do everything on a machine that has only Python, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# two cores are the size everything here is planned for
WORKERS ?= 2
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench ondevice clean install

demo: $(STAMP)
	$(BIN)/kd demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/kd recsys bench quality --json benchmarks/results/recsys_quality.json
	$(BIN)/kd recsys bench beauty --json benchmarks/results/recsys_beauty.json
	$(BIN)/kd recsys bench train --json benchmarks/results/recsys_train.json
	$(BIN)/kd recsys bench teachers --json benchmarks/results/recsys_teachers.json
	$(BIN)/kd recsys bench serve --json benchmarks/results/recsys_serve.json
	$(BIN)/kd recsys bench evaluate --json benchmarks/results/recsys_evaluate.json
	$(BIN)/kd speech bench quality --json benchmarks/results/speech_quality.json
	$(BIN)/kd speech bench train --json benchmarks/results/speech_train.json
	$(BIN)/kd speech bench digits --json benchmarks/results/speech_digits.json
	$(BIN)/kd speech bench noise --json benchmarks/results/speech_noise.json
	$(BIN)/kd speech bench runtime --json benchmarks/results/speech_runtime.json
	$(BIN)/kd bench losses --json benchmarks/results/losses.json
	$(BIN)/python benchmarks/knowledge_forms.py --json benchmarks/results/knowledge_forms.json
	$(BIN)/python -m benchmarks.readme

# .[ondevice] in an environment of its own, and a transcript there; after make demo
ondevice: $(STAMP)
	$(BIN)/python -m benchmarks.clean_install --run runs/demo/speech

install: $(STAMP)

# torchrec asks for a CUDA build of fbgemm, torchdistill (for tests, and kd bench losses) for one of torch: what they
# need is there already, so their dependencies are left alone
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt torchrec torchdistill
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
