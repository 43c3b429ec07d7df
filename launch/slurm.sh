#!/bin/bash
# Trains on several hosts with Slurm, one task a host with all its GPUs:
#
#     sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh qlora-jax train RUN.toml
#
# The tasks find each other. Options of sbatch (--time, --partition, --account) come
# before the script, and the command after it; it must be the same that continues.
#
# The job is started again, and continues from its newest checkpoint,
#   - when a process failed in a way that may pass: exit status 75, a kill or a crash;
#   - when its time is up: it saves before.
# Wrong settings (2), a failure that needs a person (1), and scancel end it.
#SBATCH --job-name=qlora-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300

# After so many starts something is wrong that does not pass.
most_restarts=20

time_is_up=no
save() {
    time_is_up=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # the tasks; not this script
}
trap save USR1

# The processes end by themselves, within seconds, with a message each. One that cannot
# is killed a while after the first has ended.
srun --kill-on-bad-exit=0 --wait=120 "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step
    wait "$step"
    status=$?
done

case $status in
    143) again=$time_is_up ;; # stopped, with everything saved
    75 | 129 | 1[3-9][0-9]) again=yes ;;
    *) again=no ;;
esac
[ "$status" -eq 130 ] && again=no

restarts=${SLURM_RESTART_COUNT:-0}
if [ "$again" = yes ] && [ "$restarts" -lt "$most_restarts" ]; then
    echo "The step ended with status $status; the job is started again." >&2
    scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until Slurm ends this script
fi
exit "$status"
