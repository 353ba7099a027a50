"""Triton kernels; ``pseudoseg_fast.backends.triton`` calls them.

    refine_cam_forward, refine_cam_backward     self-attention without the L x L matrix, and its gradient
    logit_scale                                 the batch-wide norm of upsampled maps, by the 9-point stencil
    fuse_predictions                            two maps upsampled, softmaxed, mixed, sharpened, written once
    pseudo_label                                attention, projection, batch norm and fusion in three launches

``attention``, ``bilinear`` and ``batch_norm`` hold what several kernels share, ``launch`` what every launcher uses and
``compilation`` compiles a launch for a named architecture without a GPU.

Every file has the kernel, then a function that plans its launches: results are allocated, nothing has run. All
offsets into tensors are int64; all arithmetic is float32; reductions have a fixed order, so results are repeatable
bit for bit. The formulas are those of ``pseudoseg_fast.reference``.
"""
