"""What makes data folders; run once."""
