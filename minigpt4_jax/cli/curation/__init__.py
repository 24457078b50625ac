"""The commands of `minigpt4 curate`, one file each."""
