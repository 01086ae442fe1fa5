# `make demo` and `make test` need nothing but Python 3.10 or newer: each makes .venv first.

PYTHON ?= python3
BIN := .venv/bin
# The release that the tests ran with last; pyproject.toml says which others are allowed.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo compare-demo test test-peers lint docs wheel clean

demo: .venv/ready
	$(BIN)/python tools/train_det.py --loss giou+focal

# Two losses with two seeds: too little to tell them apart, which is what it says.
compare-demo: .venv/ready
	$(BIN)/python tools/compare.py --losses l1+focal giou+focal --seeds 2 --output runs/compare-demo \
	--config configs/det/shapes.yaml --data.subset 120 --train.epochs 8 --train.eval_every 8

# One thread a process, for two threads each of two processes would stand in each other's way.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# What `make test` skips where Ultralytics, transformers and others are not installed.
PEER_TESTS := yolo transformers_detection transformers_masks transformers_segmentation segmenters \
	docs drop_ins benchmark
test-peers: .venv/peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PEER_TESTS:%=tests/test_%.py)

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site of the documentation, in build/docs; a warning is an error.
docs: .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

# Build the sdist, the wheel from it, and use that where there is no checkout to be found.
wheel: .venv/ready
	rm -rf dist
	$(BIN)/python -m build
	rm -rf dist/site && $(BIN)/python -m pip install --quiet --no-deps --target dist/site dist/*.whl
	cd dist && ../$(BIN)/python -I -c "import sys; sys.path.insert(0, 'site'); \
	import os, detseg_losses, detseg_losses.integrations as i; \
	assert {n for n in os.listdir('site') if '-' not in n} == {'bin', 'detseg_losses'}; \
	assert 'site' in detseg_losses.__file__ and 'site' in i.__file__; \
	assert os.path.exists('site/detseg_losses/py.typed'); \
	print(detseg_losses.build_loss('giou + 0.5*l1 + focal'))"
	cd dist && PYTHONPATH=site ../$(BIN)/python site/bin/detseg-train-seg \
	--config configs/seg/shapes.yaml --print_config

clean:
	rm -rf .venv build dist

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/peers: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@
