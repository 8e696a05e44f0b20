"""Names of branches, and of what λ mixes."""

REFERENCE = "reference"
ALIGNED = "aligned"
LOGITS, WEIGHTS = "logits", "weights"  # what λ mixes
