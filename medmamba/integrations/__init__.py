"""Where other projects meet this one: timm, and checkpoints of the published code."""
