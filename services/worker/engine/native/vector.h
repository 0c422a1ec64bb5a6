/* Vectors of 16 numbers: one register with AVX-512, two with AVX2. Both add up a vector's numbers in the same order. */
#ifndef RH_VECTOR_H
#define RH_VECTOR_H

#include <immintrin.h>
#include <stdint.h>

#define RH_INLINE static inline __attribute__((always_inline))
#define RH_UNROLL _Pragma("GCC unroll 16")
#define RH_LANES 16

#ifdef __AVX512F__

typedef __m512 rh_vec;
typedef __m512i rh_ints;
typedef __mmask16 rh_mask;

/* The first `count` numbers: none if it is negative, all if it is larger than 16. */
RH_INLINE rh_mask v_first(int count) {
    return count >= RH_LANES ? 0xFFFF : count <= 0 ? 0 : (rh_mask)((1u << count) - 1);
}

RH_INLINE rh_vec v_zero(void) { return _mm512_setzero_ps(); }
RH_INLINE rh_vec v_set(float x) { return _mm512_set1_ps(x); }
RH_INLINE rh_vec v_load(const float *at) { return _mm512_loadu_ps(at); }
/* What is not in the mask is not read, and 0. */
RH_INLINE rh_vec v_load_part(rh_mask mask, const float *at) { return _mm512_maskz_loadu_ps(mask, at); }
RH_INLINE void v_store(float *at, rh_vec x) { _mm512_storeu_ps(at, x); }
RH_INLINE void v_store_part(float *at, rh_mask mask, rh_vec x) { _mm512_mask_storeu_ps(at, mask, x); }
/* 0 where the mask is not. */
RH_INLINE rh_vec v_keep(rh_mask mask, rh_vec x) { return _mm512_maskz_mov_ps(mask, x); }
RH_INLINE rh_vec v_add(rh_vec a, rh_vec b) { return _mm512_add_ps(a, b); }
RH_INLINE rh_vec v_sub(rh_vec a, rh_vec b) { return _mm512_sub_ps(a, b); }
RH_INLINE rh_vec v_mul(rh_vec a, rh_vec b) { return _mm512_mul_ps(a, b); }
RH_INLINE rh_vec v_div(rh_vec a, rh_vec b) { return _mm512_div_ps(a, b); }
/* b where one of the two is NaN. */
RH_INLINE rh_vec v_min(rh_vec a, rh_vec b) { return _mm512_min_ps(a, b); }
RH_INLINE rh_vec v_max(rh_vec a, rh_vec b) { return _mm512_max_ps(a, b); }
/* a b + c, and c - a b, rounded once. */
RH_INLINE rh_vec v_fma(rh_vec a, rh_vec b, rh_vec c) { return _mm512_fmadd_ps(a, b, c); }
RH_INLINE rh_vec v_fnma(rh_vec a, rh_vec b, rh_vec c) { return _mm512_fnmadd_ps(a, b, c); }
RH_INLINE rh_vec v_abs(rh_vec x) { return _mm512_abs_ps(x); }
/* To the nearest whole number, ties to even. */
RH_INLINE rh_vec v_round(rh_vec x) { return _mm512_roundscale_ps(x, 8); }
/* x times 2 to the power of n, a whole number from -150 to 128. */
RH_INLINE rh_vec v_scale(rh_vec x, rh_vec n) { return _mm512_scalef_ps(x, n); }
/* yes where x is above 0, else no. */
RH_INLINE rh_vec v_choose(rh_vec x, rh_vec yes, rh_vec no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), yes);
}
RH_INLINE float v_sum(rh_vec x) { return _mm512_reduce_add_ps(x); }
RH_INLINE float v_largest(rh_vec x) { return _mm512_reduce_max_ps(x); }
/* 16 bf16 numbers. */
RH_INLINE rh_vec v_widen(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}
/* 32 bf16 numbers, which are the upper halves of fp32 ones: the first of each pair, and the second. */
RH_INLINE rh_vec v_even_bf16(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(at), 16));
}
RH_INLINE rh_vec v_odd_bf16(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(at), _mm512_set1_epi32((int)0xFFFF0000u)));
}
/* The same of 32 fp32 numbers. */
RH_INLINE void v_unzip(const float *at, rh_vec *even, rh_vec *odd) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512 a = _mm512_loadu_ps(at), b = _mm512_loadu_ps(at + 16);
    *even = _mm512_permutex2var_ps(a, evens, b);
    *odd = _mm512_permutex2var_ps(a, odds, b);
}

RH_INLINE rh_ints i_zero(void) { return _mm512_setzero_si512(); }
RH_INLINE rh_ints i_set(int32_t x) { return _mm512_set1_epi32(x); }
RH_INLINE rh_ints i_load(const void *at) { return _mm512_loadu_si512(at); }
RH_INLINE void i_store(void *at, rh_ints x) { _mm512_storeu_si512(at, x); }
RH_INLINE rh_ints i_xor(rh_ints a, rh_ints b) { return _mm512_xor_si512(a, b); }
/* The lower 32 bits of the products. */
RH_INLINE rh_ints i_mul(rh_ints a, rh_ints b) { return _mm512_mullo_epi32(a, b); }
RH_INLINE rh_ints i_rotate_13(rh_ints x) { return _mm512_rol_epi32(x, 13); }
RH_INLINE rh_ints i_add(rh_ints a, rh_ints b) { return _mm512_add_epi32(a, b); }
RH_INLINE rh_ints i_max(rh_ints a, rh_ints b) { return _mm512_max_epi32(a, b); }
RH_INLINE int32_t i_sum(rh_ints x) { return _mm512_reduce_add_epi32(x); }
RH_INLINE int32_t i_largest(rh_ints x) { return _mm512_reduce_max_epi32(x); }
RH_INLINE rh_ints i_bits(rh_vec x) { return _mm512_castps_si512(x); }
/* To the nearest, ties to even; 0 where the mask is not. */
RH_INLINE rh_ints i_nearest(rh_mask mask, rh_vec x) { return _mm512_maskz_cvtps_epi32(mask, x); }
RH_INLINE rh_vec v_of_ints(rh_ints x) { return _mm512_cvtepi32_ps(x); }
/* Numbers of -128 to 127. */
RH_INLINE void i_store_int8(int8_t *at, rh_ints x) { _mm_storeu_si128((__m128i *)at, _mm512_cvtsepi32_epi8(x)); }

#else

typedef struct {
    __m256 low, high;
} rh_vec;
typedef struct {
    __m256i low, high;
} rh_ints;
typedef rh_ints rh_mask;

#define RH_BOTH(name, a, b) ((rh_vec){name((a).low, (b).low), name((a).high, (b).high)})
#define RH_BOTH_INTS(name, a, b) ((rh_ints){name((a).low, (b).low), name((a).high, (b).high)})

RH_INLINE rh_ints i_load(const void *at) {
    const __m256i *place = (const __m256i *)at;
    return (rh_ints){_mm256_loadu_si256(place), _mm256_loadu_si256(place + 1)};
}

RH_INLINE rh_mask v_first(int count) {
    static const int32_t MASKS[2 * RH_LANES] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    return i_load(MASKS + RH_LANES - (count >= RH_LANES ? RH_LANES : count <= 0 ? 0 : count));
}

RH_INLINE rh_vec v_zero(void) { return (rh_vec){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
RH_INLINE rh_vec v_set(float x) { return (rh_vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
RH_INLINE rh_vec v_load(const float *at) { return (rh_vec){_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
RH_INLINE rh_vec v_load_part(rh_mask mask, const float *at) {
    return (rh_vec){_mm256_maskload_ps(at, mask.low), _mm256_maskload_ps(at + 8, mask.high)};
}
RH_INLINE void v_store(float *at, rh_vec x) {
    _mm256_storeu_ps(at, x.low);
    _mm256_storeu_ps(at + 8, x.high);
}
RH_INLINE void v_store_part(float *at, rh_mask mask, rh_vec x) {
    _mm256_maskstore_ps(at, mask.low, x.low);
    _mm256_maskstore_ps(at + 8, mask.high, x.high);
}
RH_INLINE rh_vec v_keep(rh_mask mask, rh_vec x) {
    return (rh_vec){_mm256_and_ps(_mm256_castsi256_ps(mask.low), x.low),
                    _mm256_and_ps(_mm256_castsi256_ps(mask.high), x.high)};
}
RH_INLINE rh_vec v_add(rh_vec a, rh_vec b) { return RH_BOTH(_mm256_add_ps, a, b); }
RH_INLINE rh_vec v_sub(rh_vec a, rh_vec b) { return RH_BOTH(_mm256_sub_ps, a, b); }
RH_INLINE rh_vec v_mul(rh_vec a, rh_vec b) { return RH_BOTH(_mm256_mul_ps, a, b); }
RH_INLINE rh_vec v_div(rh_vec a, rh_vec b) { return RH_BOTH(_mm256_div_ps, a, b); }
RH_INLINE rh_vec v_min(rh_vec a, rh_vec b) { return RH_BOTH(_mm256_min_ps, a, b); }
RH_INLINE rh_vec v_max(rh_vec a, rh_vec b) { return RH_BOTH(_mm256_max_ps, a, b); }
RH_INLINE rh_vec v_fma(rh_vec a, rh_vec b, rh_vec c) {
    return (rh_vec){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
RH_INLINE rh_vec v_fnma(rh_vec a, rh_vec b, rh_vec c) {
    return (rh_vec){_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
RH_INLINE rh_vec v_abs(rh_vec x) { return RH_BOTH(_mm256_andnot_ps, v_set(-0.0f), x); }
RH_INLINE rh_vec v_round(rh_vec x) {
    return (rh_vec){_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/* In two steps, neither of which leaves the range of exponents: only the second may round. */
RH_INLINE __m256 scale_8(__m256 x, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(whole, half);
    const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}
RH_INLINE rh_vec v_scale(rh_vec x, rh_vec n) { return RH_BOTH(scale_8, x, n); }
RH_INLINE __m256 choose_8(__m256 x, __m256 yes, __m256 no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}
RH_INLINE rh_vec v_choose(rh_vec x, rh_vec yes, rh_vec no) {
    return (rh_vec){choose_8(x.low, yes.low, no.low), choose_8(x.high, yes.high, no.high)};
}
#define RH_FOLD(add_8, add_4, x)                                                          \
    __m256 eight = add_8((x).low, (x).high);                                              \
    __m128 four = add_4(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    four = add_4(four, _mm_movehl_ps(four, four));                                        \
    return _mm_cvtss_f32(add_4(four, _mm_shuffle_ps(four, four, 1)))
RH_INLINE float v_sum(rh_vec x) { RH_FOLD(_mm256_add_ps, _mm_add_ps, x); }
RH_INLINE float v_largest(rh_vec x) { RH_FOLD(_mm256_max_ps, _mm_max_ps, x); }
RH_INLINE __m256 widen_8(const uint16_t *at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
}
RH_INLINE rh_vec v_widen(const uint16_t *at) { return (rh_vec){widen_8(at), widen_8(at + 8)}; }
RH_INLINE rh_vec v_even_bf16(const uint16_t *at) {
    const rh_ints pairs = i_load(at);
    return (rh_vec){_mm256_castsi256_ps(_mm256_slli_epi32(pairs.low, 16)),
                    _mm256_castsi256_ps(_mm256_slli_epi32(pairs.high, 16))};
}
RH_INLINE rh_vec v_odd_bf16(const uint16_t *at) {
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000u);
    const rh_ints pairs = i_load(at);
    return (rh_vec){_mm256_castsi256_ps(_mm256_and_si256(pairs.low, upper)),
                    _mm256_castsi256_ps(_mm256_and_si256(pairs.high, upper))};
}
#define RH_EVENS 0x88
#define RH_ODDS 0xDD
/* a, b: 16 numbers in order; a shuffle works within halves of a register, so its quarters are put right afterwards. */
#define RH_PICK(a, b, which) \
    _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, which)), 0xD8))
RH_INLINE void v_unzip(const float *at, rh_vec *even, rh_vec *odd) {
    const rh_vec a = v_load(at), b = v_load(at + 16);
    *even = (rh_vec){RH_PICK(a.low, a.high, RH_EVENS), RH_PICK(b.low, b.high, RH_EVENS)};
    *odd = (rh_vec){RH_PICK(a.low, a.high, RH_ODDS), RH_PICK(b.low, b.high, RH_ODDS)};
}

RH_INLINE rh_ints i_zero(void) { return (rh_ints){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
RH_INLINE rh_ints i_set(int32_t x) { return (rh_ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
RH_INLINE void i_store(void *at, rh_ints x) {
    _mm256_storeu_si256((__m256i *)at, x.low);
    _mm256_storeu_si256((__m256i *)at + 1, x.high);
}
RH_INLINE rh_ints i_xor(rh_ints a, rh_ints b) { return RH_BOTH_INTS(_mm256_xor_si256, a, b); }
RH_INLINE rh_ints i_mul(rh_ints a, rh_ints b) { return RH_BOTH_INTS(_mm256_mullo_epi32, a, b); }
RH_INLINE __m256i rotate_13(__m256i x) { return _mm256_or_si256(_mm256_slli_epi32(x, 13), _mm256_srli_epi32(x, 19)); }
RH_INLINE rh_ints i_rotate_13(rh_ints x) { return (rh_ints){rotate_13(x.low), rotate_13(x.high)}; }
RH_INLINE rh_ints i_add(rh_ints a, rh_ints b) { return RH_BOTH_INTS(_mm256_add_epi32, a, b); }
RH_INLINE rh_ints i_max(rh_ints a, rh_ints b) { return RH_BOTH_INTS(_mm256_max_epi32, a, b); }
#define RH_FOLD_INTS(add_8, add_4, x)                                                          \
    __m256i eight = add_8((x).low, (x).high);                                                  \
    __m128i four = add_4(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1)); \
    four = add_4(four, _mm_shuffle_epi32(four, 0x4E));                                         \
    return _mm_cvtsi128_si32(add_4(four, _mm_shuffle_epi32(four, 0xB1)))
RH_INLINE int32_t i_sum(rh_ints x) { RH_FOLD_INTS(_mm256_add_epi32, _mm_add_epi32, x); }
RH_INLINE int32_t i_largest(rh_ints x) { RH_FOLD_INTS(_mm256_max_epi32, _mm_max_epi32, x); }
RH_INLINE rh_ints i_bits(rh_vec x) { return (rh_ints){_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
RH_INLINE rh_ints i_nearest(rh_mask mask, rh_vec x) {
    return (rh_ints){_mm256_and_si256(mask.low, _mm256_cvtps_epi32(x.low)),
                     _mm256_and_si256(mask.high, _mm256_cvtps_epi32(x.high))};
}
RH_INLINE rh_vec v_of_ints(rh_ints x) { return (rh_vec){_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
RH_INLINE __m128i narrow_8(__m256i x) {
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
RH_INLINE void i_store_int8(int8_t *at, rh_ints x) {
    _mm_storeu_si128((__m128i *)at, _mm_packs_epi16(narrow_8(x.low), narrow_8(x.high)));
}

#endif
#endif
