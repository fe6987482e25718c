#!/bin/bash
# Both steps on two nodes of eight GPUs. STORE_DIR must be a file system that all nodes share.
#SBATCH --job-name=sae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# A job that is pre-empted and requeued runs the same commands again, and they resume.
set -euo pipefail
export STORE_DIR=${STORE_DIR:?a folder on the shared file system}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))  # torchrun would give each process one
cd "$SLURM_SUBMIT_DIR/experiments/verify_sae_training"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

step() {
  srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${nodes[0]}:29500" "$@"
}

step 01_save_activations.py PRESET=bielik DATA_LIMIT=1000000 STREAM=True BATCH_SIZE_SAVE=64
step 02_train_sae.py PRESET=bielik EPOCHS=1 BATCH_SIZE_TRAIN=16384
