#!/bin/bash
# Pretraining on the GPUs of one machine under torchrun; starts again while the run stops with everything saved:
#   GPUS=8 examples/torchrun.sh --config recipes/mae_vim_b.yaml
# With a limit such as --trainer.max_time 00:12:00:00 each start uses fresh processes. A signal to this script saves
# the run and stops the script; the same command continues the run.
GPUS=${GPUS:-8}

# torchrun itself exits with 1 for every failure of a rank, so read the code of the rank that failed first.
launch='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:
    sys.exit(error.get_first_failure()[1].exitcode)
'

asked=
# Signal the ranks directly: torchrun kills them 30 seconds after its own signal, and a large checkpoint may take longer.
trap 'asked=yes; pkill -TERM -P "$launcher"' TERM INT USR1

while true; do
    python -c "$launch" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
        -m ssmpretrain fit "$@" --trainer.num_nodes 1 --trainer.devices "$GPUS" &
    launcher=$!
    wait "$launcher"
    code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal has ended the wait, but not the run
        wait "$launcher"
        code=$?
    done
    if [ "$code" != 75 ] || [ -n "$asked" ]; then
        exit "$code"
    fi
done
