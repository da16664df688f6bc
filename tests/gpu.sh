#!/usr/bin/env bash
# The first day with a GPU, in three parts of less than eight minutes:
#
#     bash tests/gpu.sh A      is it right: tests, compiled and eager, killed and resumed, torchrun
#     bash tests/gpu.sh B      training: speed, memory and MFU
#     bash tests/gpu.sh C      decoding: speed, exit, speculation
#
#     --device=cpu             try the script without a GPU
#     --small                  tiny models and few steps, to try the script: its times say nothing
#     --peer=../nanoGPT        compare with a checkout of nanoGPT
#     --text=input.txt         train on tiny Shakespeare, or else on Python's standard library
#     --out=gpu-out            folder of the results: A.txt, B.txt, C.txt, BENCHMARKS.md
#
# $PYTHON is the interpreter (default: python), $OUT the default of --out. Needs torch, numpy and
# tqdm, part A also pytest and hypothesis. Nothing is downloaded. A command that fails or takes too
# long does not stop the others; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-} device=cuda small= peer= text= out=${OUT:-gpu-out} python=${PYTHON:-python}
for option in "${@:2}"; do
    case $option in
        --device=*) device=${option#*=} ;;
        --small) small=1 ;;
        --peer=*) peer=${option#*=} ;;
        --text=*) text=${option#*=} ;;
        --out=*) out=${option#*=} ;;
        *) echo "gpu.sh: $option: unknown, see the head of tests/gpu.sh" >&2; exit 2 ;;
    esac
done
[[ $part == [ABC] ]] || { echo "gpu.sh: the first argument must be A, B or C" >&2; exit 2; }
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# -----------------------------------------------------------------------------
# run SECONDS COMMAND..: with a time limit, at most what is left of the part's 460 seconds; what it
# prints is in the results as it comes
run() {
    echo; echo "\$ ${*:2}"
    local start=$SECONDS code=0 left=$((460 - SECONDS))
    ((left >= 1)) || left=1
    timeout --kill-after=10 "$(($1 < left ? $1 : left))" "${@:2}" || code=$?
    finish "$code" "$start" "${*:2}"
}

# finish CODE START WORDS: say how a command ended
finish() {
    echo "-> exit code $1 after $((SECONDS - $2)) s"
    (($1 == 0)) || failed+=("$3")
}

# run_killed SECONDS STEP FOLDER COMMAND..: end a training run by SIGKILL behind a step
run_killed() {
    echo; echo "\$ ${*:4}    (SIGKILL behind step $2)"
    local start=$SECONDS code=0
    "${@:4}" &
    local process=$!
    until grep -qs "\"iter\": $2, \"loss\"" "$3/log.jsonl" || ((SECONDS - start > $1)) ||
        ((SECONDS > 460)); do
        kill -0 "$process" 2>/dev/null || break
        sleep 0.02
    done
    kill -KILL "$process" 2>/dev/null
    wait "$process" 2>/dev/null || code=$?
    finish "$((code == 137 ? 0 : 1))" "$start" "${*:4}"
}

train() { # train SECONDS FOLDER ARGUMENTS..: of train.py
    run "$1" "$python" train.py "${@:3}" --device="$device" --out_dir="$work/$2"
}

# -----------------------------------------------------------------------------
# shapes: the configs' own, or tiny ones
chars=(config/train_shakespeare_char.py --dataset="$work/text")
looped=(config/train_shakespeare_char_looped.py --dataset="$work/text")
gpt2=() gpt2_looped=(config/train_gpt2_looped.py --loss_chunk=0) ids=() eager=()
steps=1000 half=100 whole=5000 rounds=(--rounds=5) turns=(--rounds=5 --steps=10) few=(--rounds=3)
wide=(--n_layer=2 --block_size=1024 --batch_size=8)
tests=() depths=1,2,4,8 accumulated=8 n_tokens=50000000 new=() peer_batches=(12 32) decode_loops=4,8
if [[ $small ]]; then
    tiny=(--n_embd=32 --n_head=2 --block_size=32 --batch_size=2)
    core=(--n_prelude=1 --n_block=1 --n_coda=0)
    little=(--eval_iters=2 --warmup_iters=2)
    chars+=("${tiny[@]}" "${little[@]}" --n_layer=2)
    looped+=("${tiny[@]}" "${little[@]}" "${core[@]}" --eval_loops=1,2)
    gpt2=("${tiny[@]}" --n_layer=2)
    gpt2_looped+=("${tiny[@]}" "${core[@]}")
    ids=(--vocab_size=64) eager=(--compile=False) # to compile takes most of the time
    steps=60 half=30 whole=20 rounds=(--rounds=1) turns=(--rounds=1 --steps=1) few=("${turns[@]}")
    depths=1,2 accumulated=2 n_tokens=20000 peer_batches=(2) decode_loops=4,
    new=(--prompt_tokens=4 --new_tokens=4) wide=()
    tests=(-k rows_of_their_own_depth) # one of them: pytest runs them all on a CPU anyway
fi

prepare_text() {
    if [[ $text ]]; then
        run 30 "$python" data/shakespeare_char/prepare.py --input_files="$text" \
            --out_dir="$work/text"
    elif [[ $small ]]; then
        run 30 "$python" data/text/prepare.py --input_files=README.md --out_dir="$work/text"
    else
        run 60 "$python" data/pycode/prepare.py --out_dir="$work/text"
    fi
}

# -----------------------------------------------------------------------------
part_A() {
    run 60 "$python" -m torch.utils.collect_env
    run 200 "$python" -m pytest -q tests/test_gpu.py "${tests[@]}"
    prepare_text

    # compiled and eager
    local same=(--max_iters="$steps" --eval_interval="$half" --dropout=0)
    train 60 compiled "${chars[@]}" "${same[@]}"
    train 60 eager "${chars[@]}" "${same[@]}" --compile=False
    run 10 "$python" tests/gpu_same.py "$work/compiled" "$work/eager" 0.02

    # killed and resumed, in short windows and in windows of many blocks of keys
    resume short
    [[ $small ]] || resume long "${wide[@]}" # with --small it is the same as short
    resume deterministic "${wide[@]}" --deterministic

    # one process of torchrun, and options that meet there
    local launch=(-m torch.distributed.run --standalone --nproc_per_node=1 train.py)
    local twenty=(--device="$device" --max_iters=20 --eval_iters=2 "${eager[@]}")
    run 60 "$python" "${launch[@]}" "${chars[@]}" "${twenty[@]}" --out_dir="$work/one"
    run 60 "$python" "${launch[@]}" "${looped[@]}" "${twenty[@]}" --out_dir="$work/many" \
        --optimizer=muon --recompute=cheap --loss_chunk=512 --automatic_loop_exit \
        --param_dtype=bfloat16 --spectral_clip_beta=1

    # whole: nanoGPT's mark on tiny Shakespeare is 1.4697
    train 150 whole "${chars[@]}" --max_iters="$whole" "${eager[@]}"
}

# resume NAME ARGUMENTS..: an undisturbed run, and one that is killed half way and goes on
resume() {
    local name=$1 options=("${@:2}" --max_iters=$((2 * half)) --save_interval=$((half / 2)))
    options+=(--eval_interval=$((2 * half)) --log_interval=1 --always_save_checkpoint)
    options+=("${eager[@]}")
    train 60 "$name" "${chars[@]}" "${options[@]}"
    options+=(--device="$device")
    local killed="$work/$name-killed"
    run_killed 60 "$half" "$killed" \
        "$python" train.py "${chars[@]}" "${options[@]}" --out_dir="$killed"
    run 5 test -f "$killed/ckpt.pt"
    train 60 "$name-killed" "${chars[@]}" "${options[@]}" --init_from=auto
    if [[ $name == long ]]; then # attention adds up in any order: the same bits are not promised
        run 10 "$python" tests/gpu_same.py "$work/$name" "$killed" 0.05
    else
        run 10 "$python" tests/gpu_same.py "$work/$name" "$killed"
    fi
}

# -----------------------------------------------------------------------------
part_B() {
    local bench=("$python" bench.py train --device="$device")
    if [[ $peer ]]; then
        local beside=("${gpt2[@]}" "${ids[@]}" "${eager[@]}" --bias=False)
        beside+=(--peer="$peer" --write_to="$out/BENCHMARKS.md")
        run 170 "${bench[@]}" "${beside[@]}" "${turns[@]}" --batch_size="${peer_batches[0]}"
        for batch_size in "${peer_batches[@]:1}"; do
            run 100 "${bench[@]}" "${beside[@]}" "${turns[@]}" --batch_size="$batch_size" \
                --dtypes=bfloat16
        done
    fi
    # by depth, and sampled: memory, MFU, and graphs compiled behind the warm-up
    run 120 "${bench[@]}" "${gpt2_looped[@]}" "${ids[@]}" "${rounds[@]}" "${eager[@]}" \
        --loops="$depths"
    for option in --loss_chunk=2048 --recompute=cheap --optimizer=muon; do
        run 60 "${bench[@]}" "${gpt2[@]}" "${ids[@]}" "${few[@]}" "${eager[@]}" --bias=False \
            "$option"
    done

    # train.py's own loop
    run 30 "$python" tests/gpu_tokens.py "$work/random" --n_tokens="$n_tokens"
    local loop=(--init_from=scratch --dataset="$work/random" --max_iters=30 --log_interval=1)
    loop+=(--gradient_accumulation_steps="$accumulated" --eval_iters=1 --loss_chunk=0)
    loop+=("${eager[@]}")
    train 90 plain config/train_gpt2.py "${gpt2[@]}" "${loop[@]}"
    train 90 looped "${gpt2_looped[@]}" "${loop[@]}"
}

# -----------------------------------------------------------------------------
part_C() {
    prepare_text
    local brief=(--max_iters=$((2 * steps)) --eval_interval=$((2 * steps)) --eval_iters=20)
    train 120 looped "${looped[@]}" "${brief[@]}" "${eager[@]}" --always_save_checkpoint
    local compared=()
    if [[ $peer ]]; then
        compared=(--peer="$peer")
    fi
    run 240 "$python" bench.py decode --device="$device" "${gpt2[@]}" "${ids[@]}" "${rounds[@]}" \
        "${new[@]}" "${eager[@]}" "${compared[@]}" --batch_sizes=1,16 --write_to="$out/BENCHMARKS.md" \
        --looped="$work/looped" --dataset="$work/text" --loops="$decode_loops"
    for compiled in True False; do
        run 60 "$python" sample.py "$work/looped" --device="$device" --compile="$compiled" \
            --max_new_tokens=$((steps / 4))
    done
}

{
    echo "part $part on $device, $(date)"
    "part_$part"
    echo
    printf 'failed: %s\n' "${failed[@]:-nothing}"
    ((${#failed[@]} == 0))
} 2>&1 | tee "$out/$part.txt"
