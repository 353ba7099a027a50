"""Pictures and masks: lists, data set, sampler, and the embedded satellite tiles."""
