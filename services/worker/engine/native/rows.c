/* What is done to one row at a time: norms, activations, and turning fp32 into what a product takes. */
#include <math.h>
#include <string.h>

#include "kernels.h"

RH_INLINE __mmask16 tail(int left) { return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1); }

/* e^x with a relative error below 2 ulp. NaN stays NaN: min and max give back their second operand then. Range reduction by ln 2 in two parts, then a polynomial of degree 6 (Cephes). */
__m512 rh_exp(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.7f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

RH_INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, rh_exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* 1 - erf(x) for x >= 0 (Press et al., Numerical Recipes, section 6.2, erfcc). Relative error: the formula's 1.2e-7, and what
 * rounding x squared adds, 1e-6 at 3 and 1e-5 at 9. */
RH_INLINE __m512 complementary_error(__m512 x) {
    static const float COEFFICIENTS[] = {0.17087277f, -0.82215223f, 1.48851587f,  -1.13520398f, 0.27886807f,
                                         -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f,  -1.26551223f};
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.5f), x, one));
    __m512 p = _mm512_set1_ps(COEFFICIENTS[0]);
    for (int i = 1; i < 10; i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(COEFFICIENTS[i]));
    return _mm512_mul_ps(t, rh_exp(_mm512_fnmadd_ps(x, x, p)));
}

RH_INLINE __m512 activate(int activation, __m512 x) {
    const __m512 half = _mm512_set1_ps(0.5f);
    switch (activation) {
    case RH_SILU:
        return _mm512_mul_ps(x, sigmoid(x));
    case RH_GELU: {
        /* Phi(x) is half the complementary error of -x: taken so for both signs, small results keep their digits. */
        __m512 outside = complementary_error(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678118654752f)));
        __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
        __m512 twice_phi = _mm512_mask_sub_ps(outside, is_positive, _mm512_set1_ps(2.0f), outside);
        return _mm512_mul_ps(_mm512_mul_ps(half, x), twice_phi);
    }
    case RH_GELU_TANH: {
        /* 0.5 (1 + tanh(u)) is sigmoid(2 u). */
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
        return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.5957691216057308f))));
    }
    default:
        return _mm512_max_ps(_mm512_setzero_ps(), x); /* in this order NaN stays NaN */
    }
}

static float sum_of_squares(const float *x, int size, float shift) {
    __m512 sum = _mm512_setzero_ps(), minus = _mm512_set1_ps(shift);
    for (int i = 0; i < size; i += 16) {
        __mmask16 mask = tail(size - i);
        __m512 v = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), minus);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

static float sum_of(const float *x, int size) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < size; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(tail(size - i), x + i));
    return _mm512_reduce_add_ps(sum);
}

static void scale_row(const float *x, int size, float shift, float scale, const float *weight, const float *bias,
                      float *y) {
    const __m512 minus = _mm512_set1_ps(shift), times = _mm512_set1_ps(scale);
    for (int i = 0; i < size; i += 16) {
        __mmask16 mask = tail(size - i);
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), minus), times);
        v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i));
        if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

void rh_norm_row(const rh_decoder *decoder, const rh_norm *norm, const float *x, float *y) {
    const int size = decoder->hidden_size;
    const float mean = decoder->norm_kind == RH_NORM_LAYER ? sum_of(x, size) / (float)size : 0.0f;
    const float variance = sum_of_squares(x, size, mean) / (float)size;
    scale_row(x, size, mean, 1.0f / sqrtf(variance + decoder->norm_eps), norm->weight, norm->bias, y);
}

void rh_head_norm(float *head, const float *weight, int head_dim, float eps) {
    const float variance = sum_of_squares(head, head_dim, 0.0f) / (float)head_dim;
    scale_row(head, head_dim, 0.0f, 1.0f / sqrtf(variance + eps), weight, NULL, head);
}

/* x: mlp_in's row: gate then up where the MLP is gated. */
void rh_activate_row(const rh_decoder *decoder, const float *x, float *y) {
    const int size = decoder->intermediate_size;
    for (int i = 0; i < size; i += 16) {
        __mmask16 mask = tail(size - i);
        __m512 v = activate(decoder->activation, _mm512_maskz_loadu_ps(mask, x + i));
        if (decoder->is_gated) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, x + size + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

/* Symmetric int8 with a scale for each group: one scale for a whole row loses too much where a few inputs are large. A group
 * with a number that is none has a scale that is none, so that the row's answer shows it. */
static void store_int8(const float *x, int true_inputs, int inputs, int8_t *data, float *scales, int32_t *offsets) {
    for (int group = 0; group < inputs / RH_GROUP; group++) {
        const int base = group * RH_GROUP;
        __m512 v[RH_GROUP / 16];
        __m512i largest = _mm512_setzero_si512(); /* as integers sizes sort alike, and NaN above all */
        RH_UNROLL for (int i = 0; i < RH_GROUP / 16; i++) {
            int left = true_inputs - base - 16 * i;
            v[i] = _mm512_maskz_loadu_ps(left > 0 ? tail(left) : 0, x + base + 16 * i);
            largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(v[i])));
        }
        const int32_t bits = _mm512_reduce_max_epi32(largest);
        float most;
        memcpy(&most, &bits, sizeof most);
        /* Below that 127 / most is no number; what is so small counts as zero. */
        const int is_usual = most > 1e-30f && most < INFINITY;
        const __mmask16 kept = is_usual ? 0xFFFF : 0;
        const __m512 steps = _mm512_set1_ps(is_usual ? 127.0f / most : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        RH_UNROLL for (int i = 0; i < RH_GROUP / 16; i++) {
            __m512i whole = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(v[i], steps));
            sum = _mm512_add_epi32(sum, whole);
            _mm_storeu_si128((__m128i *)(data + base + 16 * i), _mm512_cvtsepi32_epi8(whole));
        }
        scales[group] = is_usual ? most / 127.0f : most <= 1e-30f ? 0.0f : NAN;
        offsets[group] = -128 * _mm512_reduce_add_epi32(sum);
    }
}

void rh_store_row(int kind, const float *x, int true_inputs, int inputs, const rh_rows *rows, int row) {
    if (kind == RH_INT8) {
        const size_t groups = (size_t)(inputs / RH_GROUP);
        store_int8(x, true_inputs, inputs, (int8_t *)rows->data + (size_t)row * inputs, rows->scales + row * groups,
                   rows->offsets + row * groups);
        return;
    }
    float *y = (float *)rows->data + (size_t)row * inputs;
    if (x != y) memmove(y, x, sizeof(float) * true_inputs);
    memset(y + true_inputs, 0, sizeof(float) * (inputs - true_inputs));
}
