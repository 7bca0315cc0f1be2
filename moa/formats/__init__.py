"""Files: checkpoints, adapters of other libraries, safetensors, atomic writes."""
