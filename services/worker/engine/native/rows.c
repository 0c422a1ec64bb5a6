/* What is done to one row at a time: norms, activations, and turning fp32 into what a product takes. */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* e^x with a relative error below 2 ulp. NaN stays NaN: min and max give back their second operand then. Range reduction by ln 2 in two parts, then a polynomial of degree 6 (Cephes). */
rh_vec rh_exp(rh_vec x) {
    x = v_min(v_set(88.7f), v_max(v_set(-104.0f), x));
    rh_vec n = v_round(v_mul(x, v_set(1.44269504088896341f)));
    rh_vec r = v_fnma(n, v_set(0.693359375f), x);
    r = v_fnma(n, v_set(-2.12194440e-4f), r);
    rh_vec p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set(1.0f)));
    return v_scale(p, n);
}

RH_INLINE rh_vec sigmoid(rh_vec x) {
    const rh_vec one = v_set(1.0f);
    return v_div(one, v_add(one, rh_exp(v_sub(v_zero(), x))));
}

/* 1 - erf(x) for x >= 0 (Press et al., Numerical Recipes, section 6.2, erfcc). Relative error: the formula's 1.2e-7, and what
 * rounding x squared adds, 1e-6 at 3 and 1e-5 at 9. */
RH_INLINE rh_vec complementary_error(rh_vec x) {
    static const float COEFFICIENTS[] = {0.17087277f, -0.82215223f, 1.48851587f,  -1.13520398f, 0.27886807f,
                                         -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f,  -1.26551223f};
    const rh_vec one = v_set(1.0f);
    const rh_vec t = v_div(one, v_fma(v_set(0.5f), x, one));
    rh_vec p = v_set(COEFFICIENTS[0]);
    for (int i = 1; i < 10; i++) p = v_fma(p, t, v_set(COEFFICIENTS[i]));
    return v_mul(t, rh_exp(v_fnma(x, x, p)));
}

RH_INLINE rh_vec activate(int activation, rh_vec x) {
    const rh_vec half = v_set(0.5f);
    switch (activation) {
    case RH_SILU:
        return v_mul(x, sigmoid(x));
    case RH_GELU: {
        /* Phi(x) is half the complementary error of -x: taken so for both signs, small results keep their digits. */
        rh_vec outside = complementary_error(v_mul(v_abs(x), v_set(0.70710678118654752f)));
        rh_vec twice_phi = v_choose(x, v_sub(v_set(2.0f), outside), outside);
        return v_mul(v_mul(half, x), twice_phi);
    }
    case RH_GELU_TANH: {
        /* 0.5 (1 + tanh(u)) is sigmoid(2 u). */
        rh_vec cube = v_mul(v_mul(x, x), x);
        rh_vec u = v_fma(v_set(0.044715f), cube, x);
        return v_mul(x, sigmoid(v_mul(u, v_set(1.5957691216057308f))));
    }
    default:
        return v_max(v_zero(), x); /* in this order NaN stays NaN */
    }
}

static float sum_of_squares(const float *x, int size, float shift) {
    rh_vec sum = v_zero(), minus = v_set(shift);
    for (int i = 0; i < size; i += 16) {
        rh_mask mask = v_first(size - i);
        rh_vec v = v_keep(mask, v_sub(v_load_part(mask, x + i), minus));
        sum = v_fma(v, v, sum);
    }
    return v_sum(sum);
}

static float sum_of(const float *x, int size) {
    rh_vec sum = v_zero();
    for (int i = 0; i < size; i += 16) sum = v_add(sum, v_load_part(v_first(size - i), x + i));
    return v_sum(sum);
}

static void scale_row(const float *x, int size, float shift, float scale, const float *weight, const float *bias,
                      float *y) {
    const rh_vec minus = v_set(shift), times = v_set(scale);
    for (int i = 0; i < size; i += 16) {
        rh_mask mask = v_first(size - i);
        rh_vec v = v_mul(v_sub(v_load_part(mask, x + i), minus), times);
        v = v_mul(v, v_load_part(mask, weight + i));
        if (bias) v = v_add(v, v_load_part(mask, bias + i));
        v_store_part(y + i, mask, v);
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
        rh_mask mask = v_first(size - i);
        rh_vec v = activate(decoder->activation, v_load_part(mask, x + i));
        if (decoder->is_gated) v = v_mul(v, v_load_part(mask, x + size + i));
        v_store_part(y + i, mask, v);
    }
}

/* Symmetric int8 with a scale for each group: one scale for a whole row loses too much where a few inputs are large. A group
 * with a number that is none has a scale that is none, so that the row's answer shows it. */
static void store_int8(const float *x, int true_inputs, int inputs, int8_t *data, float *scales, int32_t *offsets) {
    for (int group = 0; group < inputs / RH_GROUP; group++) {
        const int base = group * RH_GROUP;
        rh_vec v[RH_GROUP / 16];
        rh_ints largest = i_zero(); /* as integers sizes sort alike, and NaN above all */
        RH_UNROLL for (int i = 0; i < RH_GROUP / 16; i++) {
            int left = true_inputs - base - 16 * i;
            v[i] = v_load_part(v_first(left), x + base + 16 * i);
            largest = i_max(largest, i_bits(v_abs(v[i])));
        }
        const int32_t bits = i_largest(largest);
        float most;
        memcpy(&most, &bits, sizeof most);
        /* Below that 127 / most is no number; what is so small counts as zero. */
        const int is_usual = most > 1e-30f && most < INFINITY;
        const rh_mask kept = v_first(is_usual ? RH_LANES : 0);
        const rh_vec steps = v_set(is_usual ? 127.0f / most : 0.0f);
        rh_ints sum = i_zero();
        RH_UNROLL for (int i = 0; i < RH_GROUP / 16; i++) {
            rh_ints whole = i_nearest(kept, v_mul(v[i], steps));
            sum = i_add(sum, whole);
            i_store_int8(data + base + 16 * i, whole);
        }
        scales[group] = is_usual ? most / 127.0f : most <= 1e-30f ? 0.0f : NAN;
        offsets[group] = -128 * i_sum(sum);
    }
}

#ifdef RH_BF16_ROWS
/* To the nearest, ties to even, as every library of bf16 does. */
static void store_bf16(const float *x, int true_inputs, int inputs, uint16_t *data) {
    for (int i = 0; i < inputs; i += RH_LANES)
        _mm256_storeu_si256((__m256i *)(data + i), (__m256i)_mm512_cvtneps_pbh(v_load_part(v_first(true_inputs - i), x + i)));
}
#endif

void rh_store_row(int kind, const float *x, int true_inputs, int inputs, const rh_rows *rows, int row) {
    if (kind == RH_INT8) {
        const size_t groups = (size_t)(inputs / RH_GROUP);
        store_int8(x, true_inputs, inputs, (int8_t *)rows->data + (size_t)row * inputs, rows->scales + row * groups,
                   rows->offsets + row * groups);
        return;
    }
#ifdef RH_BF16_ROWS
    if (kind == RH_BF16) {
        store_bf16(x, true_inputs, inputs, (uint16_t *)rows->data + (size_t)row * inputs);
        return;
    }
#endif
    float *y = (float *)rows->data + (size_t)row * inputs;
    if (x != y) memmove(y, x, sizeof(float) * true_inputs);
    memset(y + true_inputs, 0, sizeof(float) * (inputs - true_inputs));
}
