# mmfix: install, test, demo. Everything happens in .venv; nothing outside the checkout is changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO_IMAGES ?= 200
DEMO_OUT    ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help install test lint types imports unit demo record readme clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create .venv with everything, including the mmfix command

# Modules are compiled when first imported: most never are. torch goes first and by itself: asked for together with other packages, pip may take a build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

test: lint types imports unit ## lint, types, import law, tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy -p mmfix -p mmfix_kernels -p mmfix_decoding

imports: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

demo: $(STAMP) ## evaluate greedy, var and vhr on the bundled model and print the table
	$(BIN)/mmfix eval run --model tiny --tasks tinyworld-pope,tinyworld-chair --methods greedy,var,vhr \
	  --split test --limit $(DEMO_IMAGES) --out $(DEMO_OUT)

EVAL := $(BIN)/mmfix eval run --model tiny --tasks tinyworld-pope,tinyworld-chair

# Methods without a default: what they lack is chosen here, on the dev split or by hand.
CHOSEN := icd:instruction=You are a confused object detector.,act:heads=all,vseam:heads=runs/record/vseam.json,retrieval-heads:heads=runs/record/retrieval.json,positional-hidden:dims=[129],factor=-1

# Contrasts beside the plausibility cut alone, where tokens are drawn.
CONTRASTS := greedy,plausibility,avisc,causalmm,damro,deco,dola,icd:instruction=You are a confused object detector.,m3id,only,pai,sid,vcd

record: $(STAMP) ## measure the committed records anew (evals/records)
	$(EVAL) --methods greedy,var,vhr --split test --limit 500 --out runs/record/tinyworld
	for score in vseam retrieval; do $(BIN)/mmfix heads --model tiny --score $$score --out runs/record/$$score.json; done
	$(EVAL) --methods '@all,$(CHOSEN)' --split test --limit 200 --batch-size 32 --resamples 20000 --engine ray --workers 2 --out runs/record/tinyworld-all
	$(EVAL) --methods '$(CONTRASTS)' --gen-kwargs do_sample=true,temperature=1.0,top_k=0 --split test --limit 50 --batch-size 32 --resamples 20000 --engine ray --workers 2 --out runs/record/tinyworld-sampled
	$(BIN)/mmfix eval run --model tiny --tasks tinyworld-sycophancy --methods greedy,lqcd --split test --limit 100 --out runs/record/tinyworld-sycophancy
	$(EVAL) --methods greedy --split val --limit 350 --out runs/record/tinyworld-val
	$(EVAL) --methods greedy --split test --world-seed 1 --limit 350 --out runs/record/tinyworld-fresh-1
	$(EVAL) --methods greedy --split test --world-seed 2 --limit 350 --out runs/record/tinyworld-fresh-2
	for run in runs/record/tinyworld*; do \
	  mkdir -p evals/records/$$(basename $$run) && cp $$run/results.json evals/records/$$(basename $$run)/; done
	$(BIN)/mmfix eval compare runs/record/tinyworld-sampled --baseline plausibility --json > evals/records/tinyworld-sampled/against-cut.json

readme: $(STAMP) ## regenerate the README's tables, example and pictures from the committed records
	PYTHONPATH=.:tests $(BIN)/python -m families.table
	$(BIN)/python -m mmfix_evals.tinyworld.card
	$(BIN)/python -m mmfix_evals.readme --example

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
