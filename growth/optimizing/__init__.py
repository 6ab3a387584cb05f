"""An optimizer's state carried along: what a Trainer saved, grown as its model grows."""
