"""What latents mean and do: where they fire, their names, the dictionary and page of them, their effects."""
