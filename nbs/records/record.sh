#!/usr/bin/env bash
# Runs `make demo` and `make test` in a fresh clone of what is committed, with an empty pip environment, and keeps
# what they print and what the README shows. Usage: make record
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q "$here" "$work/seqtransfer"
cd "$work/seqtransfer"
export SEQTRANSFER_CACHE="$work/cache"
export SEQTRANSFER_REALDATA="${SEQTRANSFER_REALDATA:-$here/../shared/realdata}"
make install
measured() {  # runs a command and adds its wall clock time and the memory of its largest process
  python3 - "$@" <<'PY'
import resource, subprocess, sys, time
start = time.monotonic()
code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"({' '.join(sys.argv[1:])}: {time.monotonic() - start:.0f} s after installation, largest process {peak:.1f} GB)", flush=True)
sys.exit(code)
PY
}
measured make demo > demo.txt 2>&1 || { cat demo.txt; exit 1; }
measured make test > test.txt 2>&1 || { cat test.txt; exit 1; }
records=$here/nbs/records
if [ -d "$SEQTRANSFER_REALDATA" ]; then  # real MRI is not part of the project: the table is kept, no picture of it
  .venv/bin/seqtransfer run "$SEQTRANSFER_REALDATA" --target Hippocampus-T1-posterior --shots 4 --test 20 \
    --arms scratch,direct-choice,sequential,recommended --out real > real.txt 2> real.log || { cat real.log; exit 1; }
  cp real.txt "$records/realdata.txt"
fi
rm -rf "$records/demo" && mkdir -p "$records/demo"
cp -r demo/run/{affinity-seed0,protocol-seed0.json,arms,overlays} "$records/demo/"
rm -rf "$records"/demo/affinity-seed0/figures  # pictures are drawn from the tables
sed "s#$work/seqtransfer/##g" demo.txt > "$records/demo.txt"
echo "Recorded. Execute nbs/index.ipynb (make notebooks does) and run make readme."
