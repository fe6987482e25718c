"""SAEs written in other tools' files; the hub; what latents fire on, for others to show. lib/exchange reads SAEs."""
