#!/bin/sh
# Are the answers the same on another machine? The first adapter's are decoded there, and it is trained there once more:
#   sh configs/smollm2-135m-instruct/elsewhere.sh
# after runs/smollm2-135m-instruct/tone/preferences and tone/dpo were copied to it. evidence.py compares.
set -eu
recipe=configs/smollm2-135m-instruct
runs=runs/smollm2-135m-instruct
python $recipe/prepare.py
dera sweep --config $recipe/tone/sweep.yaml --lambda 0,1,3 --output-dir $runs/tone/sweep-elsewhere
dera dpo --config $recipe/tone/dpo.yaml --output_dir $runs/tone/again
dera sweep --config $recipe/tone/sweep.yaml --lambda 1 \
  --adapter $runs/tone/again --output-dir $runs/tone/sweep-again
