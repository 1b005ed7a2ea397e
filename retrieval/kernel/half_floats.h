// Conversions of float16 to float32 and back.

#pragma once

#include "inner_products.h"

#include <cstdint>

namespace {

constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

void convert(const uint16_t* values, int64_t count, float* results) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(results + i, Half::eight(values + i));
    for (; i < count; ++i) results[i] = Half::one(values[i]);
}

void convert(const float* values, int64_t count, uint16_t* results) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i*)(results + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), NEAREST));
    for (; i < count; ++i) results[i] = _cvtss_sh(values[i], NEAREST);
}

} // namespace
