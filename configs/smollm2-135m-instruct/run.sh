#!/bin/sh
# All that docs/evidence.md shows but for another machine's part, from the repository's root; hours on a CPU, minutes on
# a GPU:
#   pip install -e '.[evidence]'
#   sh configs/smollm2-135m-instruct/run.sh
# Stopped and run again, it goes on: each command does nothing again that it has done.
set -eu
recipe=configs/smollm2-135m-instruct
runs=runs/smollm2-135m-instruct
mkdir -p $runs
if command -v nvidia-smi > /dev/null; then
  machine=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
else
  machine="$(nproc) cores of $(grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2)"
fi
printf 'start\t%s\n' "$machine" >> $runs/times.tsv

# Runs a command, and notes the processor time of all commands up to it.
step() {
  "$@"
  times > $runs/times.now
  printf '%s\t%s\n' "$(tail -n 1 $runs/times.now)" "$*" >> $runs/times.tsv
}

step python $recipe/prepare.py

# The tone: one adapter, and the curve over λ
step dera preferences --config $recipe/tone/preferences.yaml
step dera dpo --config $recipe/tone/dpo.yaml
step dera sweep --config $recipe/tone/sweep.yaml
step python $recipe/evidence.py

# Retrained at β/λ for λ = 2, 0.5 and 3, and decoded as trained
for beta in 0.05 0.2 0.0333; do
  step dera dpo --config $recipe/tone/dpo.yaml --beta $beta --output_dir $runs/tone/beta-$beta
  step dera sweep --config $recipe/tone/sweep.yaml --lambda 1 \
    --adapter $runs/tone/beta-$beta --output-dir $runs/tone/sweep-beta-$beta
done

# The same with pairs on which DPO has an optimum, which is twice as far away at half of β
for beta in 0.1 0.05; do
  step dera dpo --config $recipe/tone/dpo.yaml --dataset_name $recipe/noisy.py:pairs --beta $beta \
    --num_train_epochs "$(echo $beta | awk '{ print 0.1 / $1 }')" \
    --gradient_accumulation_steps 1 --save_steps 40 --output_dir $runs/tone/noisy-$beta
  [ -s $runs/tone/margin-noisy-$beta.json ] ||
    step dera score --adapter $runs/tone/noisy-$beta --pairs $runs/tone/preferences/preferences.jsonl \
      --chat --lambda 1 --json > $runs/tone/margin-noisy-$beta.json
  step dera sweep --config $recipe/tone/sweep.yaml --lambda "$([ $beta = 0.1 ] && echo 0.5,1,2 || echo 0.5,1)" \
    --adapter $runs/tone/noisy-$beta --output-dir $runs/tone/sweep-noisy-$beta
done

# The same λ by other ways: the adapter's weights scaled, and a rule that keeps to plausible tokens
step dera sweep --config $recipe/tone/sweep.yaml \
  --arm combine=plausible:0.1,lambdas=1,2,4,8 --arm mixing=weights,lambdas=0.5,2,3,4

# A wished length: the paper's first experiment
step dera preferences --config $recipe/length/preferences.yaml
step dera dpo --config $recipe/length/dpo.yaml
step dera sweep --config $recipe/length/sweep.yaml

# Three more trainings, which differ in nothing but the seed
for seed in 2 3 4; do
  step dera dpo --config $recipe/tone/dpo.yaml --seed $seed --output_dir $runs/tone/seed-$seed
  step dera sweep --config $recipe/tone/sweep.yaml --lambda 0.5,1,2,4 \
    --adapter $runs/tone/seed-$seed --output-dir $runs/tone/sweep-seed-$seed
done

# Other temperatures
for temperature in 0.4 1; do
  step dera sweep --config $recipe/tone/sweep.yaml --lambda 0,1,2,4 \
    --temperature $temperature --output-dir $runs/tone/sweep-temperature-$temperature
done

step python $recipe/evidence.py
