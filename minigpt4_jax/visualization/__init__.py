"""Pictures for people: boxes drawn into images, contact sheets, loss curves."""
