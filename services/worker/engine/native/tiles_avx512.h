/* Tiles of up to 8 rows by a whole panel: the sums fill half of the 32 registers, the rest holds weights on their way. */
#define TILE_ROWS 8
#define EACH_COUNT(DO, kind) \
    DO(kind, 1) DO(kind, 2) DO(kind, 3) DO(kind, 4) DO(kind, 5) DO(kind, 6) DO(kind, 7) DO(kind, 8)
#define HALVES_fp32(rows) 2
#define HALVES_bf16(rows) 2
#define HALVES_int8(rows) 2
static const int MOST_ROWS[3] = {8, 8, 8};

RH_INLINE void tile_fp32(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs;
    const float *w = (const float *)at->weights;
    const float *x = (const float *)p->x->data + at->row * inputs;
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int k = at->from; k < at->to; k++, w += RH_PANEL) {
        const __m512 low = _mm512_loadu_ps(w), high = _mm512_loadu_ps(w + 16);
        ahead = fetch(ahead, at->ahead_gap, halves);
        FOR_ROWS {
            const __m512 input = _mm512_set1_ps(x[r * inputs + k]);
            sums[r][0] = _mm512_fmadd_ps(low, input, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(high, input, sums[r][1]);
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}

#ifdef RH_BF16_ROWS

/* Pairs of inputs by pairs of weights, summed in fp32: one step where fp32 takes two. */
RH_INLINE void tile_bf16(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs;
    const uint16_t *w = (const uint16_t *)at->weights;
    const uint16_t *x = (const uint16_t *)p->x->data + at->row * inputs;
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int k = at->from; k < at->to; k += 2, w += 2 * RH_PANEL) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(w), high = (__m512bh)_mm512_loadu_si512(w + 32);
        ahead = fetch(ahead, at->ahead_gap, halves);
        FOR_ROWS {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + r * inputs + k));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, pair);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, pair);
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}

#else

/* bf16 weights are the upper halves of fp32 numbers: two operations make a vector of pairs into two vectors of fp32.
 * (Products of bf16 were half as fast on the one processor of Intel's that was tried.) */
RH_INLINE void tile_bf16(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs;
    const uint16_t *w = (const uint16_t *)at->weights;
    const float *x = (const float *)p->x->data + at->row * inputs;
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int k = at->from; k < at->to; k += 2, w += 2 * RH_PANEL) {
        const __m512 low_even = v_even_bf16(w), low_odd = v_odd_bf16(w);
        const __m512 high_even = v_even_bf16(w + 32), high_odd = v_odd_bf16(w + 32);
        ahead = fetch(ahead, at->ahead_gap, halves);
        FOR_ROWS {
            const __m512 first = _mm512_set1_ps(x[r * inputs + k]), second = _mm512_set1_ps(x[r * inputs + k + 1]);
            sums[r][0] = _mm512_fmadd_ps(low_even, first, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(high_even, first, sums[r][1]);
            sums[r][0] = _mm512_fmadd_ps(low_odd, second, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(high_odd, second, sums[r][1]);
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}

#endif

RH_INLINE void tile_int8(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs, groups = inputs / RH_GROUP;
    const uint8_t *w = (const uint8_t *)at->weights;
    const int8_t *x = (const int8_t *)p->x->data + at->row * inputs + at->from;
    const float *scales = p->x->scales + at->row * groups;
    const int32_t *offsets = p->x->offsets + at->row * groups;
    const char *ahead = at->ahead;
    __m512 sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int group = at->from / RH_GROUP; group < at->to / RH_GROUP; group++, x += RH_GROUP) {
        __m512i counts[TILE_ROWS][2];
        FOR_SUMS counts[r][h] = _mm512_set1_epi32(offsets[r * groups + group]);
        for (int quad = 0; quad < RH_GROUP; quad += 4, w += 4 * RH_PANEL) {
            const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
            ahead = fetch(ahead, at->ahead_gap, halves);
            FOR_ROWS {
                const __m512i input = _mm512_set1_epi32(*(const int32_t *)(x + r * inputs + quad));
                counts[r][0] = _mm512_dpbusd_epi32(counts[r][0], low, input);
                counts[r][1] = _mm512_dpbusd_epi32(counts[r][1], high, input);
            }
        }
        const uint16_t *weight_scales = p->linear->scales + (at->panel * groups + group) * RH_PANEL;
        const __m512 low_scale = v_widen(weight_scales), high_scale = v_widen(weight_scales + 16);
        FOR_ROWS {
            const __m512 scale = _mm512_set1_ps(scales[r * groups + group]);
            sums[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(counts[r][0]), _mm512_mul_ps(scale, low_scale), sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(counts[r][1]), _mm512_mul_ps(scale, high_scale), sums[r][1]);
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}
