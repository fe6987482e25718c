"""What latents mean and do: where they fire, patterns and chat models that name them, the dictionary, the page,
effects.
"""
