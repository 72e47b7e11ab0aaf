"""What a trainer uses: rollouts, outputs as arrays, log-likelihoods, LoRA."""
