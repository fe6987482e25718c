"""Other tools' SAE files, one file a tool, and the table of them; the hub; what latents fire on, for others to show."""
