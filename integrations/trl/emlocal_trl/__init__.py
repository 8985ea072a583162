"""EM-FT and EM-RL as trainers of TRL, for machines that emlocal's own loop does not reach (docs/scale.md).

    em_ft    EMFTTrainer: H + β·KL of the model's own answers, exact, token by token
    em_rl    EMRLTrainer: RLOO with the token or the sequence reward
    guards   emlocal's guards as a callback
    run      `torchrun -m emlocal_trl.run`: emlocal's settings to a trainer

The arithmetic is emlocal's (emlocal.backends.torch.policy); TRL generates, shards and saves.
"""
