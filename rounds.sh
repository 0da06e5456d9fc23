#!/usr/bin/env bash
# Iterated DoReMi: stages 1 to 3 again and again, each round's reference trained on the last round's answer, until no
# weight moves by 1e-3 (the paper's rule) or the rounds are used up. What is done is not done again, what was cut off
# goes on, and every command can be pasted alone.
#
#   ./rounds.sh [FLAGS] [-- FLAGS of train_reference.py [-- FLAGS of train_doremi.py]]
#
#   --data_dir=data/demo          data set of prepare.py
#   --out_dir=checkpoints/rounds  a directory for each round in it: OUT_DIR/1/{reference,proxy}, OUT_DIR/2/...
#   --rounds=4                    at most so many
#   --start=uniform               what the first reference is trained on; see --domain_weights of train_reference.py
#   --nproc_per_node=1            ranks that torchrun starts
#   --python=FILE                 the Python to run (default: .venv, made as ./demo.sh makes it)
#
#   ./rounds.sh --rounds=3 -- @configs/demo_small.txt -- --step_size=0.04 --update_after=500
set -euo pipefail

fail() { echo "$0: error: $1" >&2; exit 2; }
run() { printf '%q ' "$@"; echo; "$@"; }

data_dir=data/demo out_dir=checkpoints/rounds rounds=4 start=uniform nproc_per_node=1 python=
reference_flags=() proxy_flags=() part=0
for word in "$@"; do
    case $part,$word in
        0,-h | 0,--help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
        [01],--) part=$((part + 1)) ;;
        0,--data_dir=?* | 0,--out_dir=?* | 0,--rounds=?* | 0,--start=?* | 0,--nproc_per_node=?* | 0,--python=?*)
            name=${word%%=*}
            printf -v "${name#--}" %s "${word#*=}" ;;
        0,*) fail "$word is no flag of it, or has no value; see --help (flags of the training scripts come after --)." ;;
        *,--data_dir* | *,--out_dir* | *,--domain_weights* | *,--reference*) fail "$word: each round sets that itself." ;;
        1,*) reference_flags+=("$word") ;;
        2,*) proxy_flags+=("$word") ;;
    esac
done
for name in rounds nproc_per_node; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "--$name=${!name}: expected a whole number above 0."
done

cd "$(dirname "$0")"
if [ -z "$python" ]; then  # an environment of its own, made once and renewed when requirements.txt changes
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    cmp -s requirements.txt .venv/installed.txt || .venv/bin/pip install -q -r requirements.txt
    cp requirements.txt .venv/installed.txt
    python=.venv/bin/python
fi
train=("$python")
[ "$nproc_per_node" = 1 ] || train+=(-m torch.distributed.run --standalone --nproc_per_node="$nproc_per_node")

# Finished rounds are skipped without a look at their flags, so these must be the same
settings="--data_dir=$data_dir --start=$start -- ${reference_flags[*]-} -- ${proxy_flags[*]-}"
if [ -f "$out_dir/rounds.txt" ] && [ "$(cat "$out_dir/rounds.txt")" != "$settings" ]; then
    fail "$out_dir was started with '$(cat "$out_dir/rounds.txt")', now it is '$settings'; choose another --out_dir."
fi

# unfinished, moving or converged: what a round's weights.json says of it
state() {
    [ -f "$1" ] || { echo unfinished; return; }
    "$python" -c '
import json, sys
record = json.load(open(sys.argv[1], encoding="utf-8"))["provenance"]
print("unfinished" if record["steps"] < record["max_steps"] else "converged" if record["converged"] else "moving")' "$1"
}

trap 'exit 130' INT  # Ctrl-C: the training script saves and ends well, so that without this the next one would start
weights=$start
for ((round = 1; round <= rounds; round++)); do
    directory=$out_dir/$round
    answer=$directory/proxy/weights.json
    found=$(state "$answer")
    if [ "$found" = unfinished ]; then
        run "${train[@]}" train_reference.py ${reference_flags[@]+"${reference_flags[@]}"} --data_dir="$data_dir" \
            --domain_weights="$weights" --out_dir="$directory/reference" --resume
        run "${train[@]}" train_doremi.py ${proxy_flags[@]+"${proxy_flags[@]}"} --reference="$directory/reference" \
            --out_dir="$directory/proxy" --resume
        run "$python" average_weights.py "$directory/proxy"
        found=$(state "$answer")
        [ "$found" != unfinished ] || fail "round $round was cut off; the same command goes on with it."
        echo "$settings" > "$out_dir/rounds.txt"
    fi
    weights=$answer
    [ "$found" != converged ] || break
done

# The table: what the first reference was trained on, then each round's answer and how far it is from its reference
"$python" - "$out_dir" $((round < rounds ? round : rounds)) <<'EOF'
import json
import sys

out_dir, rounds = sys.argv[1], range(1, int(sys.argv[2]) + 1)
answers = [json.load(open(f"{out_dir}/{n}/proxy/weights.json", encoding="utf-8")) for n in rounds]
records = [answer["provenance"] for answer in answers]
start = records[0]["reference"]["sampling_weights"]
width = max(map(len, [*start, "total variation"]))
print(f"\n{'domain':{width}}     start" + "".join(f"   round {n}" for n in rounds))
for name in answers[0]["domain_weights"]:
    print(f"{name:{width}}  {start[name]:8.4f}" + "".join(f"  {answer['domain_weights'][name]:8.4f}" for answer in answers))
for label, key in (("largest move", "largest_move"), ("total variation", "total_variation")):
    print(f"{label:{width}}          " + "".join(f"  {record[key]:8.4f}" for record in records))
end = "not converged: a larger --rounds goes on"
if records[-1]["converged"]:
    end = "converged: no weight moved by 1e-3"
elif records[-1]["largest_move"] > records[0]["largest_move"]:
    end = "not converged, and moves more than round 1: use that one's answer, or train for longer (docs/results.md)"
print(f"round {rounds[-1]}: {end}")
EOF
