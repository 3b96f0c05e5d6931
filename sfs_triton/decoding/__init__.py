"""Parameters of decoding: samplers and cache policies, as frozen records without tensors."""
