// Pairs of bfloat16, and the instruction that multiplies two pairs and adds both products to a float: vdpbf16ps of
// AVX-512 BF16, bfdot of ARM. With it, Fma's engine runs on pairs instead of floats: twice the products an instruction.
//
//   lane i:   c[i] += a[i].low b[i].low + a[i].high b[i].high
//
// A bfloat16 is a float without its last 16 bits, so it has float's range and 8 bits of mantissa. Matrices are rounded
// to it while they are packed, to nearest, ties to even; sums are floats, and everything else stays as it is. NaN and
// infinities are kept; subnormals become zero.
//
// The instructions, by name: the rest of this instruction set must not use them, since a processor may lack them
// (Kernels::has_bfloat16 in kernels.h).
//
// Compiled once per instruction set (all_kernels.h), where it has such an instruction.

using Pair = uint32_t; // two bfloat16; of k in the low half, of k + 1 in the high half
template <> constexpr int per<Pair> = 2;

FASTGPT_INLINE void multiply_add(vec<float>& c, vec<Pair> a, vec<Pair> b) {
#ifdef __x86_64__
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#else
    __asm__(".arch_extension bf16\n\tbfdot %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
#endif
}

// The values of two registers, rounded, in their order.
FASTGPT_INLINE vec<Pair> in_order(vec<float> first, vec<float> second) {
    vec<Pair> pairs;
#ifdef __x86_64__
    __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs) : "v"(second), "v"(first));
#else
    __asm__(".arch_extension bf16\n\tbfcvtn %0.4h, %1.4s\n\tbfcvtn2 %0.8h, %2.4s"
            : "=&w"(pairs)
            : "w"(first), "w"(second));
#endif
    return pairs;
}

// Lane i: low[i] and high[i], rounded.
template <int N> struct FromBothHalves {
    static constexpr int from(int i) { return i / 2 + (i & 1 ? N / 2 : 0); }
};
FASTGPT_INLINE vec<Pair> interleaved(vec<float> low, vec<float> high) {
    const vec<Pair> pairs = in_order(low, high);
    vec<uint16_t> halves;
    __builtin_memcpy(&halves, &pairs, sizeof halves);
    halves = shuffle<FromBothHalves<VL<uint16_t>>, uint16_t>(halves, halves);
    vec<Pair> result;
    __builtin_memcpy(&result, &halves, sizeof result);
    return result;
}

// v, rounded: a bfloat16 in the high half of a lane is a float.
FASTGPT_INLINE vec<float> rounded_to_bfloat16(vec<float> v) {
    const vec<Pair> pairs = interleaved(vec<float>{}, v);
    __builtin_memcpy(&v, &pairs, sizeof v);
    return v;
}
