"""Triton kernels; ``pseudoseg_fast.backends.triton`` calls them.

| file | what | launches |
| --- | --- | --- |
| refine_cam_forward | self-attention without the L x L matrix | 1 |
| refine_cam_backward | its gradient | 2; 3 above 32 channels of cam; 1 for cam alone |
| logit_scale | the norm of upsampled maps by the 9-point stencil, and the batch norm before it | part of the next two |
| fuse_predictions | two maps upsampled, softmaxed, mixed, sharpened, written once | 2; 1 for norms pixel and none |
| pseudo_label | attention, projection, batch norm and fusion | 3; 4 above 32 channels of cam |
| depthwise | convolutions of single channels, with dilation | 1; 2 for the gradients, whose sums PyTorch adds up |

``attention``, ``bilinear`` and ``batch_norm`` hold what several kernels share, ``launch`` what every launcher uses;
``compilation`` compiles a launch for a named architecture without a GPU, and ``machine_code`` looks for a fault in it.

Every file has the kernel, then a function that plans its launches: results are allocated, nothing has run. All
offsets into tensors are int64; all arithmetic is float32; reductions have a fixed order, so results are repeatable
bit for bit. The formulas are those of ``pseudoseg_fast.reference``.

What must move through memory, beside low-resolution maps read once or twice: the attention reads query, key and cam
and writes [B, L, K]; the fusion writes the label and reads nothing of its size. So the attention is bound by its
products (2 L^2 (D + K) operations an image forward, at most twice that in each launch backward) and the
fusion by the writing of the label in float32 and about equally by the first cache, 8 reads an element, in half
precision. On an H200 the fusion took 1.3 ms at VOC's full size and batch 8, and the attention, forward and backward in
float32, 1.6 (bench/results/gpu); what bounds them has not been looked at.
"""
