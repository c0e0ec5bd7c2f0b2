"""Dropout bits inside a kernel: Philox4x32-7, as `gpt1_kernels.rng` defines them."""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """The four words of a counter under a key, all of them uint32.

    As `tl.philox`, which multiplies twice, once for each half of a product: in 64 bits both come
    from one instruction.
    """
    for _ in tl.static_range(7):
        even, odd = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0, odd.to(tl.uint32)
        c2, c3 = (even >> 32).to(tl.uint32) ^ c3 ^ k1, even.to(tl.uint32)
        # Keys wrap by design; under TRITON_DEBUG=1 a checked overflow would end the kernel.
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_block(seed_ptr, row, block):
    """The four words, eight 16-bit values, of each block (row, block); the two broadcast.

    Word k holds value 2k in its low half and value 2k + 1 in its high half.
    """
    key, site_and_step = tl.load(seed_ptr), tl.load(seed_ptr + 1)
    step, site = site_and_step.to(tl.uint32), (site_and_step >> 32).to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return philox4x32(block.to(tl.uint32), row.to(tl.uint32), step, site, k0, k1)


@triton.jit
def keep_mask(seed_ptr, row, threshold, BLOCK_C: tl.constexpr):
    """Which elements survive in these rows, (BLOCK_N,), and the columns below BLOCK_C.

    Returns (BLOCK_N, BLOCK_C), True keeps. Each block is drawn once, by the thread that uses its
    eight values.
    """
    block = tl.arange(0, BLOCK_C // 8)
    w0, w1, w2, w3 = philox_block(seed_ptr, row[:, None], block[None, :])
    # Each join appends an axis of 2; from the last axis on, these are the bits of column mod 8.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_N, BLOCK_C // 8, 2, 2)
    values = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(values >= threshold, (row.shape[0], BLOCK_C))
